"""Tiny checkpoints in FP8 as DeepSeek-V3 is published, and what they stand for in fp32.

Sizes are such that blocks are cut off (96 and 192 rows), and all matrices that are fused line up.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from cluster.config import CommsConfig
from cluster.model.checkpoint import Checkpoint
from cluster.model.config import ModelConfig
from cluster.model.cuda.checkpoint import DeviceCheckpoint
from cluster.model.cuda.transformer import CudaTransformer
from cluster.model.loader import Loader
from comms.topology import Topology
from experts.float8 import dequantized, quantize_blocks
from router.placement import Placement
from tests.gpu.plain_ops import PlainOps
from tests.model.solo import solo_groups

KINDS = ["mla", "gqa"]
HIDDEN, EXPERT, DENSE, VOCABULARY, EXPERTS = 256, 128, 384, 96, 4
QUANTIZATION = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [128, 128],
}
_COMMON = {
    "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": DENSE,
    "moe_intermediate_size": EXPERT, "num_hidden_layers": 2, "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6, "torch_dtype": "bfloat16", "num_experts_per_tok": 2,
}  # fmt: skip
_CONFIGS = {
    "mla": {
        **_COMMON, "model_type": "deepseek_v3", "num_attention_heads": 2, "num_key_value_heads": 2,
        "q_lora_rank": 128, "kv_lora_rank": 64, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32,
        "v_head_dim": 64, "n_routed_experts": EXPERTS, "n_shared_experts": 1, "n_group": 2,
        "topk_group": 1, "first_k_dense_replace": 1, "routed_scaling_factor": 1.5,
    },
    "gqa": {
        **_COMMON, "model_type": "qwen3_moe", "num_attention_heads": 2, "num_key_value_heads": 2,
        "head_dim": 64, "num_experts": EXPERTS, "mlp_only_layers": [0], "norm_topk_prob": True,
    },
}  # fmt: skip


def write(directory: Path, kind: str, *, float8: bool = True, **config) -> Path:
    """A random checkpoint with the config's values changed; or the same one dequantised, in fp32."""
    values = {**_CONFIGS[kind], **config}
    tensors: dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed(7)

    def norm(name: str, size: int) -> None:
        tensors[name] = 1 + 0.1 * torch.randn(size, generator=generator)

    def matrix(name: str, rows: int, columns: int, *, scaled: bool = True) -> None:
        wide = torch.randn(rows, columns, generator=generator) * columns**-0.5
        if not scaled:
            tensors[name] = wide.to(torch.bfloat16)
            return
        w, scale = quantize_blocks(wide * 2 ** torch.randn(rows, 1, generator=generator))
        if float8:
            tensors[name], tensors[f"{name}_scale_inv"] = w, scale
        else:
            tensors[name] = dequantized(w, scale)

    def mlp(name: str, size: int) -> None:
        matrix(f"{name}.gate_proj.weight", size, HIDDEN)
        matrix(f"{name}.up_proj.weight", size, HIDDEN)
        matrix(f"{name}.down_proj.weight", HIDDEN, size)

    matrix("model.embed_tokens.weight", VOCABULARY, HIDDEN, scaled=False)
    tensors["model.embed_tokens.weight"] *= HIDDEN**0.5
    matrix("lm_head.weight", VOCABULARY, HIDDEN, scaled=False)
    norm("model.norm.weight", HIDDEN)
    for layer in range(2):
        name = f"model.layers.{layer}"
        norm(f"{name}.input_layernorm.weight", HIDDEN)
        norm(f"{name}.post_attention_layernorm.weight", HIDDEN)
        attention = _mla if kind == "mla" else _gqa
        for part, shape in attention(values).items():
            if len(shape) == 1:
                norm(f"{name}.self_attn.{part}.weight", *shape)
            else:
                matrix(f"{name}.self_attn.{part}.weight", *shape)
    mlp("model.layers.0.mlp", DENSE)
    for expert in range(EXPERTS):
        mlp(f"model.layers.1.mlp.experts.{expert}", EXPERT)
    matrix("model.layers.1.mlp.gate.weight", EXPERTS, HIDDEN, scaled=False)
    if kind == "mla":
        mlp("model.layers.1.mlp.shared_experts", EXPERT)
        tensors["model.layers.1.mlp.gate.e_score_correction_bias"] = torch.zeros(EXPERTS)
    if float8:
        values["quantization_config"] = QUANTIZATION
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(values))
    save_file(tensors, directory / "model.safetensors")
    return directory


def _mla(config) -> dict[str, tuple[int, ...]]:
    heads, nope = config["num_attention_heads"], config["qk_nope_head_dim"]
    rotary, latent, value = (config[k] for k in ("qk_rope_head_dim", "kv_lora_rank", "v_head_dim"))
    rank = config["q_lora_rank"]
    return {
        "q_a_proj": (rank, HIDDEN),
        "q_a_layernorm": (rank,),
        "q_b_proj": (heads * (nope + rotary), rank),
        "kv_a_proj_with_mqa": (latent + rotary, HIDDEN),
        "kv_a_layernorm": (latent,),
        "kv_b_proj": (heads * (nope + value), latent),
        "o_proj": (HIDDEN, heads * value),
    }


def _gqa(config) -> dict[str, tuple[int, ...]]:
    dim, heads, kv_heads = (
        config[k] for k in ("head_dim", "num_attention_heads", "num_key_value_heads")
    )
    return {
        "q_proj": (heads * dim, HIDDEN),
        "k_proj": (kv_heads * dim, HIDDEN),
        "v_proj": (kv_heads * dim, HIDDEN),
        "q_norm": (dim,),
        "k_norm": (dim,),
        "o_proj": (HIDDEN, heads * dim),
    }


def loader_of(checkpoint: Checkpoint, topology: Topology | None = None, **options) -> Loader:
    """Of one rank, keeping FP8 unless the options say otherwise."""
    return Loader(
        checkpoint=checkpoint,
        config=ModelConfig.from_dir(checkpoint.directory),
        topology=topology or Topology(num_nodes=1, ranks_per_node=1),
        dtype=torch.bfloat16,
        **{"rank": 0, "keep_float8": True, **options},
    )


def load(directory, device, *, quantization=None, kernels: bool = False) -> CudaTransformer:
    """The model of one rank, with plain torch for its kernels or with the kernels themselves."""
    config, groups = ModelConfig.from_dir(directory), solo_groups()
    placement = Placement.contiguous(config.num_moe_layers, config.num_experts, 1)
    if kernels:
        return CudaTransformer.load(
            directory, config, groups, placement, CommsConfig(),
            quantization=quantization, device=device,
        )  # fmt: skip
    with DeviceCheckpoint(directory, device) as checkpoint:
        return CudaTransformer.build(
            loader_of(checkpoint, keep_float8=quantization != "bfloat16"), groups, placement,
            CommsConfig(), quantization=quantization, device=device, ops=PlainOps(),
        )  # fmt: skip
