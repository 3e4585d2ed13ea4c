"""Reading single values out of a `config.json`, with errors that name the file and the key."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from cluster.model.errors import CheckpointError, UnsupportedModelError
from cluster.model.rope import RopeConfig, yarn_mscale

SUPPORTED_ROPE_TYPES = ("default", "linear", "yarn")
"""Dynamic NTK is left out on purpose: its angles depend on how long the batch's sequences are."""


@dataclass(frozen=True, kw_only=True)
class ConfigJson:
    file: Path
    values: dict[str, Any]

    def integer(self, key: str) -> int:
        """A required positive integer."""
        value = self.values.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise CheckpointError(self.file, f"{key} must be a positive integer, got {value!r}")
        return value

    def count(self, key: str) -> int:
        """An optional non-negative integer; null or absent is 0."""
        return 0 if self.values.get(key) in (None, 0) else self.integer(key)

    def number(self, key: str, default: float | None = None) -> float:
        value = self.values.get(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise CheckpointError(self.file, f"{key} must be a number, got {value!r}")
        return float(value)


def refuse(config: ConfigJson, key: str, *, unless: object, why: str) -> None:
    """Raise UnsupportedModelError if `key` is set to anything but `unless`."""
    value = config.values.get(key)
    if value is not None and value != unless:
        raise UnsupportedModelError(
            f"{config.file}: {why} ({key}={value!r}) {'are' if why.endswith('s') else 'is'} "
            "not supported"
        )


def read_rope(
    config: ConfigJson, *, dim: int, interleaved: bool, default_theta: float
) -> tuple[RopeConfig, dict[str, Any]]:
    """The rotary embedding, from `rope_parameters` (transformers 5) or `rope_scaling` + `rope_theta`.

    Also returns the raw dictionary, for what an architecture reads from it besides.
    """
    values = config.values
    raw = dict(values.get("rope_scaling") or values.get("rope_parameters") or {})
    kind = raw.get("rope_type") or raw.get("type") or "default"
    if kind not in SUPPORTED_ROPE_TYPES:
        raise UnsupportedModelError(
            f"{config.file}: rope type {kind!r} is not supported; "
            f"supported are {', '.join(SUPPORTED_ROPE_TYPES)}"
        )
    partial = raw.get("partial_rotary_factor", values.get("partial_rotary_factor"))
    if partial not in (None, 1, 1.0):
        raise UnsupportedModelError(
            f"{config.file}: partial_rotary_factor={partial!r} is not supported"
        )
    max_positions = config.integer("max_position_embeddings")
    theta = raw.get("rope_theta") or values.get("rope_theta") or default_theta
    original = (
        values.get("original_max_position_embeddings")
        or raw.get("original_max_position_embeddings")
        or max_positions
    )
    factor = raw.get("factor") or (max_positions / original if kind == "yarn" else 1.0)
    rope = RopeConfig(
        dim=dim,
        theta=float(theta),
        interleaved=interleaved,
        kind=cast(Literal["default", "linear", "yarn"], kind),
        factor=float(factor) if kind != "default" else 1.0,
        attention_factor=_attention_factor(raw, float(factor)) if kind == "yarn" else 1.0,
        original_max_positions=int(original),
        beta_fast=float(raw.get("beta_fast") or 32),
        beta_slow=float(raw.get("beta_slow") or 1),
        truncate=bool(raw.get("truncate", True)),
    )
    return rope, raw


def _attention_factor(raw: dict[str, Any], factor: float) -> float:
    """What YaRN multiplies cos and sin by: explicit, or from mscale over mscale_all_dim."""
    explicit = raw.get("attention_factor")
    if explicit is not None:
        return float(explicit)
    mscale, all_dim = raw.get("mscale"), raw.get("mscale_all_dim")
    if mscale and all_dim:
        return yarn_mscale(factor, mscale) / yarn_mscale(factor, all_dim)
    return yarn_mscale(factor)
