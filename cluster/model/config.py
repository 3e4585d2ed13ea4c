"""What a model is, read from the `config.json` of a Hugging Face checkpoint directory.

One `ModelConfig` describes every supported architecture; the rest of the package looks at its
fields and never at the architecture's name. What we cannot compute exactly is refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cluster.model.config_json import ConfigJson, read_rope, refuse
from cluster.model.errors import CheckpointError, UnsupportedModelError
from cluster.model.rope import RopeConfig, yarn_mscale
from router.gate import GateConfig


@dataclass(frozen=True, kw_only=True)
class GqaConfig:
    """Grouped-query attention; `qk_norm` normalises each head's query and key (Qwen3)."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    qk_norm: bool
    softmax_scale: float

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                "num_attention_heads must be a multiple of num_key_value_heads, got "
                f"{self.num_heads} % {self.num_kv_heads} = {self.num_heads % self.num_kv_heads}"
            )


@dataclass(frozen=True, kw_only=True)
class MlaConfig:
    """Multi-head latent attention (DeepSeek-V2, section 2.1); q_lora_rank 0 = one q_proj."""

    num_heads: int
    q_lora_rank: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    softmax_scale: float


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes are in elements. `moe_layers` are the layers with experts; the others are dense.

    A placement's layer i is `moe_layers[i]`. `shared_intermediate_size` 0 = no shared expert.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    max_position_embeddings: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    attention: GqaConfig | MlaConfig
    rope: RopeConfig
    gate: GateConfig
    has_correction_bias: bool
    moe_layers: tuple[int, ...]
    dense_intermediate_size: int
    expert_intermediate_size: int
    shared_intermediate_size: int
    eos_token_ids: tuple[int, ...]
    dtype: Literal["bfloat16", "float32"]
    float8: bool = False
    """The checkpoint has matrices in e4m3 with an fp32 scale for each block of 128 x 128."""

    def __post_init__(self) -> None:
        if not self.moe_layers:
            raise UnsupportedModelError(
                f"{self.architecture} without a single expert layer is not supported"
            )

    @property
    def num_moe_layers(self) -> int:
        return len(self.moe_layers)

    @property
    def num_experts(self) -> int:
        return self.gate.num_experts

    @staticmethod
    def from_dir(path: str | Path) -> ModelConfig:
        """Raises CheckpointError for a missing or broken config.json, UnsupportedModelError."""
        file = Path(path) / "config.json"
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise CheckpointError(file, "no such file") from error
        except (OSError, ValueError) as error:
            raise CheckpointError(file, f"not readable as JSON: {error}") from error
        if not isinstance(values, dict):
            raise CheckpointError(file, "not a JSON object")
        return from_values(ConfigJson(file=file, values=values), _eos(file.parent, values))


def from_values(config: ConfigJson, eos_token_ids: tuple[int, ...]) -> ModelConfig:
    """The ModelConfig of one config.json, by its model_type."""
    model_type = config.values.get("model_type")
    read = SUPPORTED.get(str(model_type))
    if read is None:
        raise UnsupportedModelError(
            f"{config.file}: model_type {model_type!r} is not supported; "
            f"supported are {', '.join(sorted(SUPPORTED))}"
        )
    refuse(config, "attention_bias", unless=False, why="biases in attention")
    refuse(config, "mlp_bias", unless=False, why="biases in MLPs")
    refuse(config, "hidden_act", unless="silu", why="an activation other than SiLU")
    dtype = config.values.get("dtype") or config.values.get("torch_dtype")
    return ModelConfig(
        architecture=str(model_type),
        vocab_size=config.integer("vocab_size"),
        hidden_size=config.integer("hidden_size"),
        num_layers=config.integer("num_hidden_layers"),
        max_position_embeddings=config.integer("max_position_embeddings"),
        rms_norm_eps=config.number("rms_norm_eps"),
        tie_word_embeddings=bool(config.values.get("tie_word_embeddings", False)),
        eos_token_ids=eos_token_ids,
        dtype="float32" if dtype == "float32" else "bfloat16",
        float8=_is_float8(config),
        **read(config),
    )


def _is_float8(config: ConfigJson) -> bool:
    """Quantised as DeepSeek-V3 is published; UnsupportedModelError if in any other way."""
    found = config.values.get("quantization_config")
    if found is None:
        return False
    wanted = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    also = {"fmt": "e4m3", "activation_scheme": "dynamic", "scale_fmt": "float"}
    known = isinstance(found, dict) and all(found.get(k) == v for k, v in wanted.items())
    if not known or any(found.get(k, v) != v for k, v in also.items()):
        refuse(config, "quantization_config", unless=None, why="otherwise quantised weights")
    return True


def _deepseek(config: ConfigJson, gate: GateConfig, *, interleaved: bool) -> dict[str, Any]:
    refuse(config, "moe_layer_freq", unless=1, why="expert layers at intervals")
    num_heads = config.integer("num_attention_heads")
    refuse(config, "num_key_value_heads", unless=num_heads, why="fewer KV heads than heads in MLA")
    nope, rotary = config.integer("qk_nope_head_dim"), config.integer("qk_rope_head_dim")
    rope, raw_rope = read_rope(config, dim=rotary, interleaved=interleaved, default_theta=1e4)
    scale = (nope + rotary) ** -0.5
    if rope.kind != "default" and raw_rope.get("mscale_all_dim"):
        scale *= yarn_mscale(rope.factor, float(raw_rope["mscale_all_dim"])) ** 2
    num_layers, first_moe = (
        config.integer("num_hidden_layers"),
        config.count("first_k_dense_replace"),
    )
    expert_size = config.integer("moe_intermediate_size")
    return {
        "attention": MlaConfig(
            num_heads=num_heads,
            q_lora_rank=config.count("q_lora_rank"),
            kv_lora_rank=config.integer("kv_lora_rank"),
            qk_nope_head_dim=nope,
            qk_rope_head_dim=rotary,
            v_head_dim=config.integer("v_head_dim"),
            softmax_scale=scale,
        ),
        "rope": rope,
        "gate": gate,
        "has_correction_bias": gate.scoring == "sigmoid",
        "moe_layers": tuple(range(first_moe, num_layers)),
        "dense_intermediate_size": config.integer("intermediate_size"),
        "expert_intermediate_size": expert_size,
        "shared_intermediate_size": config.count("n_shared_experts") * expert_size,
    }


def _deepseek_v2(config: ConfigJson) -> dict[str, Any]:
    method = config.values.get("topk_method", "greedy")
    if method not in ("greedy", "group_limited_greedy"):
        raise UnsupportedModelError(f"{config.file}: topk_method {method!r} is not supported")
    refuse(config, "norm_topk_prob", unless=False, why="renormalised weights in deepseek_v2")
    refuse(config, "scoring_func", unless="softmax", why="another score function in deepseek_v2")
    grouped = method == "group_limited_greedy"
    gate = GateConfig(
        num_experts=config.integer("n_routed_experts"),
        num_experts_per_token=config.integer("num_experts_per_tok"),
        num_groups=config.integer("n_group") if grouped else 1,
        num_groups_per_token=config.integer("topk_group") if grouped else 1,
        scaling_factor=config.number("routed_scaling_factor", 1.0),
    )
    return _deepseek(config, gate, interleaved=True)


def _deepseek_v3(config: ConfigJson) -> dict[str, Any]:
    refuse(config, "topk_method", unless="noaux_tc", why="another top-k method in deepseek_v3")
    refuse(config, "scoring_func", unless="sigmoid", why="another score function in deepseek_v3")
    gate = GateConfig(
        num_experts=config.integer("n_routed_experts"),
        num_experts_per_token=config.integer("num_experts_per_tok"),
        scoring="sigmoid",
        num_groups=config.integer("n_group"),
        num_groups_per_token=config.integer("topk_group"),
        group_score="top2_sum",
        renormalize=bool(config.values.get("norm_topk_prob", True)),
        scaling_factor=config.number("routed_scaling_factor", 1.0),
    )
    return _deepseek(config, gate, interleaved=bool(config.values.get("rope_interleave", True)))


def _gqa(config: ConfigJson, *, qk_norm: bool, default_theta: float) -> dict[str, Any]:
    num_heads = config.integer("num_attention_heads")
    head_dim = config.count("head_dim") or config.integer("hidden_size") // num_heads
    window = config.count("sliding_window") if config.values.get("use_sliding_window", True) else 0
    if 0 < window < config.integer("max_position_embeddings"):
        raise UnsupportedModelError(
            f"{config.file}: sliding_window={window} shorter than max_position_embeddings="
            f"{config.integer('max_position_embeddings')} is not supported"
        )
    return {
        "attention": GqaConfig(
            num_heads=num_heads,
            num_kv_heads=config.count("num_key_value_heads") or num_heads,
            head_dim=head_dim,
            qk_norm=qk_norm,
            softmax_scale=head_dim**-0.5,
        ),
        "rope": read_rope(config, dim=head_dim, interleaved=False, default_theta=default_theta)[0],
        "has_correction_bias": False,
        "shared_intermediate_size": 0,
    }


def _qwen3_moe(config: ConfigJson) -> dict[str, Any]:
    step = config.count("decoder_sparse_step") or 1
    dense_layers = config.values.get("mlp_only_layers") or []
    layers = range(config.integer("num_hidden_layers"))
    experts_key = "num_experts" if "num_experts" in config.values else "num_local_experts"
    return {
        **_gqa(config, qk_norm=True, default_theta=1e4),
        "gate": GateConfig(
            num_experts=config.integer(experts_key),
            num_experts_per_token=config.integer("num_experts_per_tok"),
            renormalize=bool(config.values.get("norm_topk_prob", False)),
        ),
        "moe_layers": tuple(i for i in layers if i not in dense_layers and (i + 1) % step == 0),
        "dense_intermediate_size": config.integer("intermediate_size"),
        "expert_intermediate_size": config.integer("moe_intermediate_size"),
    }


def _mixtral(config: ConfigJson) -> dict[str, Any]:
    return {
        **_gqa(config, qk_norm=False, default_theta=1e6),
        "gate": GateConfig(
            num_experts=config.integer("num_local_experts"),
            num_experts_per_token=config.integer("num_experts_per_tok"),
            renormalize=True,
        ),
        "moe_layers": tuple(range(config.integer("num_hidden_layers"))),
        "dense_intermediate_size": 0,
        "expert_intermediate_size": config.integer("intermediate_size"),
    }


SUPPORTED: dict[str, Callable[[ConfigJson], dict[str, Any]]] = {
    "deepseek_v2": _deepseek_v2,
    "deepseek_v3": _deepseek_v3,
    "kimi_k2": _deepseek_v3,  # the same architecture in other sizes
    "mixtral": _mixtral,
    "qwen3_moe": _qwen3_moe,
}
"""Readers by `model_type`."""


def _eos(directory: Path, values: dict[str, Any]) -> tuple[int, ...]:
    """End-of-sequence ids: generation_config.json's if it names any, else config.json's."""
    found = values.get("eos_token_id")
    file = directory / "generation_config.json"
    if file.exists():
        try:
            generation = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(file, f"not readable as JSON: {error}") from error
        found = generation.get("eos_token_id", found)
    if found is None:
        return ()
    return tuple(found) if isinstance(found, list) else (int(found),)
