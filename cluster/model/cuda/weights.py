"""Matrices on the device: bfloat16 as they are, or float8 with one scale for each block of 128 x 128.

Legend: O out-features, I in-features, B stacked matrices, P and Q blocks of O and of I.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

BLOCK = 128
_GREATEST = 448.0  # of float8_e4m3fn
_LEAST_AMAX = 1e-12  # a block of zeros has a scale too


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """w_OI bfloat16 without a scale; or float8_e4m3fn, w = w_OI * scale_PQ by blocks of 128 x 128."""

    w_OI: Tensor
    scale_PQ: Tensor | None = None

    @staticmethod
    def of(w_OI: Tensor, *, float8: bool) -> Matrix:
        """As it is, or quantised."""
        if not float8:
            return Matrix(w_OI=w_OI)
        quantized, scale = quantize_blocks(w_OI)
        return Matrix(w_OI=quantized, scale_PQ=scale)

    @property
    def num_bytes(self) -> int:
        return self.w_OI.nbytes + (0 if self.scale_PQ is None else self.scale_PQ.nbytes)


def quantize_blocks(w_BOI: Tensor) -> tuple[Tensor, Tensor]:
    """(w float8_e4m3fn, scale fp32 [..., ceil(O / 128), ceil(I / 128)]) of [O, I] or [B, O, I].

    scale = greatest magnitude of the block / 448, as DeepSeek-V3 (section 3.3.2) keeps its weights; the
    last blocks may be cut off. Takes a few times the matrix's memory for a moment.
    """
    *_, rows, columns = w_BOI.shape
    padded = F.pad(w_BOI.float(), (0, -columns % BLOCK, 0, -rows % BLOCK))
    blocks = padded.unflatten(-1, (-1, BLOCK)).unflatten(-3, (-1, BLOCK))  # [..., P, 128, Q, 128]
    scale = blocks.abs().amax(dim=(-3, -1)).clamp(min=_LEAST_AMAX) / _GREATEST
    quantized = (blocks / scale[..., :, None, :, None]).to(torch.float8_e4m3fn)
    whole = quantized.flatten(-4, -3).flatten(-2, -1)
    return whole[..., :rows, :columns].contiguous(), scale.contiguous()


def dequantized(w_BOI: Tensor, scale_BPQ: Tensor) -> Tensor:
    """What `quantize_blocks` stands for, in fp32: the oracle of products with it."""
    *_, rows, columns = w_BOI.shape
    spread = scale_BPQ.repeat_interleave(BLOCK, -2).repeat_interleave(BLOCK, -1)
    return w_BOI.float() * spread[..., :rows, :columns]
