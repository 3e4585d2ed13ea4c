"""Rotary position embedding: pairs of channels turned by an angle proportional to the position.

The angles come from a table computed once, so a position always gets the same bits. YaRN (Peng et
al. 2023) slows the slow channels down and leaves the fast ones, which stretches the context.

Legend: T tokens, N heads, R rotary channels, F = R / 2 frequencies, L positions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """`kind` says how `factor` stretches the context; the YaRN fields matter for "yarn" only.

    `attention_factor` multiplies cos and sin (already resolved from mscale / mscale_all_dim).
    `interleaved`: channels (2i, 2i+1) are a pair, as in DeepSeek; else (i, i + R/2).
    """

    dim: int
    theta: float
    interleaved: bool
    kind: Literal["default", "linear", "yarn"] = "default"
    factor: float = 1.0
    attention_factor: float = 1.0
    original_max_positions: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True

    def __post_init__(self) -> None:
        if self.dim < 2 or self.dim % 2:
            raise ValueError(f"rotary channels come in pairs, got dim={self.dim}")
        if self.theta <= 1.0 or self.factor <= 0.0:
            raise ValueError(
                f"rope needs theta > 1 and factor > 0, got theta={self.theta}, factor={self.factor}"
            )
        if self.kind == "yarn" and self.original_max_positions < 1:
            raise ValueError("yarn needs original_max_positions >= 1")


def yarn_mscale(factor: float, mscale: float = 1.0) -> float:
    """How much sharper attention must be in a context stretched by `factor` (YaRN, eq. 22)."""
    return 1.0 if factor <= 1.0 else 0.1 * mscale * math.log(factor) + 1.0


def inverse_frequencies(config: RopeConfig) -> Tensor:
    """Radians per position of each channel pair, fp32 [F]."""
    exponents_F = torch.arange(0, config.dim, 2, dtype=torch.float32) / config.dim
    periods_F = config.theta**exponents_F
    if config.kind == "default":
        return 1.0 / periods_F
    if config.kind == "linear":
        return 1.0 / periods_F / config.factor
    keep_F = 1.0 - _yarn_ramp(config)
    return (1.0 / (config.factor * periods_F)) * (1.0 - keep_F) + (1.0 / periods_F) * keep_F


def _yarn_ramp(config: RopeConfig) -> Tensor:
    """0 for channel pairs that keep their frequency, 1 for those slowed by `factor`, fp32 [F].

    A pair that makes more than beta_fast turns within the original context is kept, one that makes
    fewer than beta_slow is slowed, with a straight line over the pair index between them.
    """

    def pair_with(turns: float) -> float:
        wavelengths = math.log(config.original_max_positions / (turns * 2 * math.pi))
        return config.dim * wavelengths / (2 * math.log(config.theta))

    low, high = pair_with(config.beta_fast), pair_with(config.beta_slow)
    if config.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, config.dim - 1)
    if low == high:
        high += 0.001  # a step, without dividing by zero
    pairs_F = torch.arange(config.dim // 2, dtype=torch.float32)
    return ((pairs_F - low) / (high - low)).clamp(0, 1)


class RotaryTable:
    """cos and sin of every position below `num_positions`, fp32 [L, F] each."""

    def __init__(self, config: RopeConfig, num_positions: int) -> None:
        self.config = config
        positions_L = torch.arange(num_positions, dtype=torch.float32)
        # The angle is rounded to fp32 as the reference does it; cos and sin of it are then exact to
        # the last bit, wherever the position stands in the table.
        angles_LF = torch.outer(positions_L, inverse_frequencies(config)).double()
        self._cos_LF = (angles_LF.cos() * config.attention_factor).float()
        self._sin_LF = (angles_LF.sin() * config.attention_factor).float()

    @property
    def num_bytes(self) -> int:
        return self._cos_LF.nbytes + self._sin_LF.nbytes

    def at(self, positions_T: Tensor) -> Rotation:
        """The rotation of each token. Raises IndexError beyond the table."""
        return Rotation(
            cos_TF=self._cos_LF[positions_T],
            sin_TF=self._sin_LF[positions_T],
            interleaved=self.config.interleaved,
        )


@dataclass(frozen=True, kw_only=True)
class Rotation:
    """The angles of one step's tokens, shared by its layers."""

    cos_TF: Tensor
    sin_TF: Tensor
    interleaved: bool

    def __call__(self, x_TNR: Tensor) -> Tensor:
        """Turn every head's pairs; fp32 inside, dtype and channel layout of x kept."""
        cos_T1F, sin_T1F = self.cos_TF.unsqueeze(1), self.sin_TF.unsqueeze(1)
        x_fp32 = x_TNR.float()
        if self.interleaved:
            a_TNF, b_TNF = x_fp32[..., 0::2], x_fp32[..., 1::2]
        else:
            a_TNF, b_TNF = x_fp32.chunk(2, dim=-1)
        turned = (a_TNF * cos_T1F - b_TNF * sin_T1F, b_TNF * cos_T1F + a_TNF * sin_T1F)
        out = torch.stack(turned, dim=-1).flatten(-2) if self.interleaved else torch.cat(turned, -1)
        return out.to(x_TNR.dtype)
