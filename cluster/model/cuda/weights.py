"""A matrix on the device: bfloat16 as it is, or float8 with one scale for each block of 128 x 128; and a norm.

Legend: O out-features, I in-features, P and Q blocks of O and of I.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cluster.model.norm import RmsNorm
from experts.float8 import BlockScaled, as_float8, multiplies_float8, plain
from experts.kernels.types import BLOCK


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """w_OI bfloat16 without a scale; or float8_e4m3fn, w = w_OI * scale_PQ by blocks of 128 x 128."""

    w_OI: Tensor
    scale_PQ: Tensor | None = None

    @staticmethod
    def of(w_OI: Tensor, *, float8: bool, device: torch.device | None = None) -> Matrix:
        """As it is, also in float8, or quantised if `float8`.

        On GPUs without float8 arithmetic it becomes bfloat16: dense products have no other form there.
        """
        device = device or w_OI.device
        scale_PQ = w_OI.scale_PQ.to(device) if isinstance(w_OI, BlockScaled) else None
        there = w_OI.as_subclass(Tensor).to(device)
        if scale_PQ is not None:
            there = BlockScaled.of(there, scale_PQ)
        if not multiplies_float8(device):
            return Matrix(w_OI=plain(there).to(torch.bfloat16))
        if float8:
            there = as_float8(there)
        if isinstance(there, BlockScaled):
            return Matrix(w_OI=there.as_subclass(Tensor), scale_PQ=there.scale_PQ)
        return Matrix(w_OI=there)

    @property
    def is_float8(self) -> bool:
        return self.scale_PQ is not None

    @property
    def num_bytes(self) -> int:
        return self.w_OI.nbytes + (0 if self.scale_PQ is None else self.scale_PQ.nbytes)


@dataclass(frozen=True)
class Norm(RmsNorm):
    """`float8`: the matrices that read its rows are, so they are quantised in the same launch."""

    float8: bool = False

    def for_matrices(self, *, float8: bool) -> Norm:
        """Of FP8 or not; rows that are no multiple of 128 channels are never quantised here."""
        return replace(self, float8=float8 and len(self.weight) % BLOCK == 0)
