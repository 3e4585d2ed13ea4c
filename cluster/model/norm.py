"""RMS norm: each row divided by its root mean square, times a learned gain.

Everything is computed in fp32 and cast once at the end. The row-wise mean, the fp32 square root and
the products round the same way wherever a row stands in its batch (torch's fp32 `silu` and
`sigmoid` and bf16 `rsqrt` do not), so a row's result never depends on its neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class RmsNorm:
    """y = x / sqrt(mean(x^2) + eps) * weight over the last dimension (Zhang & Sennrich 2019)."""

    weight: Tensor
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        """x [..., D] of any float dtype -> the same shape and dtype."""
        x_fp32 = x.float()
        mean_square = x_fp32.square().mean(-1, keepdim=True)
        return (x_fp32 * torch.rsqrt(mean_square + self.eps) * self._weight_fp32).to(x.dtype)

    @cached_property
    def _weight_fp32(self) -> Tensor:
        return self.weight.float()
