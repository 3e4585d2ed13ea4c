"""The shape of mosaic, and transformers' own DeepSeek-V3 class built from it for training."""

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from deploy.models.permuted import permuted_experts

Config = dict[str, Any]


def mosaic_config(vocab_size: int, max_length: int) -> Config:
    """config.json as DeepSeek publishes it, at toy width.

    Four groups of eight experts, two groups a token: on 2 x 2 ranks a group is one rank's experts,
    so the group limit bounds the ranks a token visits, as it bounds nodes in DeepSeek-V3.
    """
    return {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "vocab_size": vocab_size,
        "hidden_size": 256,
        "intermediate_size": 768,
        "moe_intermediate_size": 64,
        "num_hidden_layers": 6,
        "first_k_dense_replace": 1,
        "moe_layer_freq": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "q_lora_rank": 128,
        "kv_lora_rank": 128,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 32,
        "v_head_dim": 64,
        "n_routed_experts": 32,
        "n_shared_experts": 1,
        "num_experts_per_tok": 4,
        "n_group": 4,
        "topk_group": 2,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.0,
        "hidden_act": "silu",
        "max_position_embeddings": max_length,
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "rope_interleave": True,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": True,
        "num_nextn_predict_layers": 0,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "torch_dtype": "bfloat16",
        "use_cache": True,
    }


def build_model(config: Config, device: torch.device, seed: int) -> DeepseekV3ForCausalLM:
    """A fresh BF16 model. The gate's correction bias stays fp32, since its steps are tiny."""
    torch.manual_seed(seed)
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**config))
    model.tie_weights()
    num_branches = 2 * config["num_hidden_layers"]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj", "down_proj.weight")):
                parameter.div_(math.sqrt(num_branches))  # keeps the residual stream's scale
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    use_fast_experts(model, device)
    nn.Module.to(model, device)
    return model


def use_fast_experts(model: DeepseekV3ForCausalLM, device: torch.device) -> None:
    """Grouped experts on an accelerator; transformers' plain loop on the CPU."""
    ALL_EXPERTS_FUNCTIONS.register("permuted_grouped_mm", permuted_experts)
    model.set_experts_implementation("permuted_grouped_mm" if device.type == "cuda" else "eager")


def add_dropout(model: DeepseekV3ForCausalLM, probability: float) -> None:
    """Dropout on the embedding and on every residual branch, in training mode only."""

    def drop(module: nn.Module, _args: object, output: Any) -> Any:
        if isinstance(output, tuple):
            first = nn.functional.dropout(output[0], probability, module.training)
            return (first, *output[1:])
        return nn.functional.dropout(output, probability, module.training)

    modules = [model.model.embed_tokens]
    for layer in model.model.layers:
        modules += [layer.self_attn, layer.mlp]
    for module in modules:
        module.register_forward_hook(drop)


def gates(model: DeepseekV3ForCausalLM) -> dict[int, Any]:
    """The gate of each MoE layer, by layer number."""
    layers = enumerate(model.model.layers)
    return {idx: layer.mlp.gate for idx, layer in layers if hasattr(layer.mlp, "gate")}


def save_checkpoint(model: DeepseekV3ForCausalLM, config: Config, directory: Path) -> None:
    """Plain Hugging Face files: one tensor per expert and projection, as DeepSeek names them."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config["tie_word_embeddings"]:
            continue
        for saved_name, part in _per_expert(name, tensor.detach().cpu()):
            dtype = torch.float32 if name.endswith("correction_bias") else torch.bfloat16
            tensors[saved_name] = part.to(dtype).contiguous()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    generation = {"bos_token_id": 0, "eos_token_id": 0, "do_sample": False}
    _write_json(directory / "config.json", config)
    _write_json(directory / "generation_config.json", generation)


def _per_expert(name: str, tensor: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    if name.endswith("experts.gate_up_proj"):
        stem = name.removesuffix("gate_up_proj")
        return [
            (f"{stem}{expert}.{part}.weight", weight)
            for expert, both in enumerate(tensor)
            for part, weight in zip(("gate_proj", "up_proj"), both.chunk(2), strict=True)
        ]
    if name.endswith("experts.down_proj"):
        stem = name.removesuffix("down_proj")
        return [(f"{stem}{expert}.down_proj.weight", w) for expert, w in enumerate(tensor)]
    return [(name, tensor)]


def _write_json(path: Path, content: Config) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
