"""Tiny random checkpoints of every supported architecture, written by transformers itself.

Weights are scaled so that logits differ clearly between tokens: every norm's output matters, the
gate is decided (no near-ties that rounding could flip), and greedy decoding wanders instead of
repeating one token. Sizes are awkward on purpose: vocabularies no tensor-parallel size divides,
expert counts no six ranks divide, head sizes below and off the powers of two.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

_COMMON: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_DEEPSEEK: dict[str, Any] = {
    **_COMMON,
    "num_key_value_heads": 4,
    "kv_lora_rank": 20,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "moe_intermediate_size": 24,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.5,
}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 0.707,
    "mscale_all_dim": 1.0,
}
_QWEN3: dict[str, Any] = {
    **_COMMON,
    "num_key_value_heads": 2,
    "head_dim": 20,
    "moe_intermediate_size": 24,
    "num_experts": 10,
    "num_experts_per_tok": 3,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [1],
}

SPECS: dict[str, tuple[str, dict[str, Any]]] = {
    "deepseek_v2_greedy": (
        "deepseek_v2",
        {**_DEEPSEEK, "q_lora_rank": None, "topk_method": "greedy", "n_shared_experts": 2},
    ),
    "deepseek_v2_grouped": (
        "deepseek_v2",
        {
            **_DEEPSEEK,
            "q_lora_rank": 28,
            "topk_method": "group_limited_greedy",
            "n_group": 4,
            "topk_group": 2,
            "n_shared_experts": 1,
        },
    ),
    "deepseek_v3_qlora": (
        "deepseek_v3",
        {**_DEEPSEEK, "q_lora_rank": 28, "n_group": 4, "topk_group": 2, "n_shared_experts": 1},
    ),
    "deepseek_v3_plain": (
        "deepseek_v3",
        {
            **_DEEPSEEK,
            "q_lora_rank": None,
            "n_group": 1,
            "topk_group": 1,
            "n_shared_experts": 1,
            "rope_interleave": False,
            "norm_topk_prob": False,
        },
    ),
    "deepseek_v3_yarn": (
        "deepseek_v3",
        {
            **_DEEPSEEK,
            "q_lora_rank": 28,
            "n_group": 2,
            "topk_group": 1,
            "n_shared_experts": 1,
            "rope_parameters": _YARN,
        },
    ),
    "deepseek_v2_yarn": (
        "deepseek_v2",
        {
            **_DEEPSEEK,
            "q_lora_rank": None,
            "topk_method": "greedy",
            "n_shared_experts": 1,
            "rope_parameters": _YARN,
        },
    ),
    "qwen3_moe_norm": ("qwen3_moe", {**_QWEN3, "norm_topk_prob": True}),
    "qwen3_moe_tied": (
        "qwen3_moe",
        {**_QWEN3, "norm_topk_prob": False, "tie_word_embeddings": True},
    ),
    "mixtral": (
        "mixtral",
        {**_COMMON, "num_key_value_heads": 2, "num_local_experts": 7, "num_experts_per_tok": 2},
    ),
}
"""Name -> (transformers model_type, config values)."""

NAMES = tuple(SPECS)


def write_checkpoint(name: str, directory: Path, *, shard_size: str = "150KB") -> Path:
    """Write SPECS[name] to `directory` in fp32, in shards of `shard_size`; returns the directory."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type, values = SPECS[name]
    generator = torch.Generator().manual_seed(NAMES.index(name))
    config = AutoConfig.for_model(model_type, **values)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            tensor.copy_(_random(key, tensor.shape, generator))
        model.tie_weights()
    model.save_pretrained(directory, max_shard_size=shard_size)
    return directory


def _random(key: str, shape: Any, generator: Any) -> Any:
    """Values of one parameter, of a size that keeps activations near 1 through the layers."""
    import torch

    noise = torch.randn(shape, generator=generator)
    if "norm" in key:
        return 1.0 + 0.2 * noise
    if key.endswith("correction_bias"):
        return 0.2 * noise
    if "embed_tokens" in key or "lm_head" in key:
        return noise * (0.3 if "lm_head" in key else 1.0)
    gain = 2.0 if "gate.weight" in key or "q_" in key or "k_" in key else 1.0
    return noise * gain / shape[-1] ** 0.5
