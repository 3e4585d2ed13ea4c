"""Matrices in e4m3 with an fp32 scale for each block of 128 x 128, as DeepSeek-V3 (section 3.3.2) has them.

Legend: O out-features, I in-features, B stacked matrices, P and Q blocks of O and of I.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from experts.kernels.types import BLOCK

FLOAT8 = torch.float8_e4m3fn
_GREATEST = 448.0
_LEAST_AMAX = 1e-12  # a block of zeros has a scale too


class BlockScaled(Tensor):
    """w_OI float8_e4m3fn that knows its scales: w = w_OI * scale_PQ by blocks; the last may be cut off.

    A tensor, so that modules carry it from where it is read to the device that computes with it.
    Operations do not know of the scales: what they return is a plain tensor of e4m3.
    """

    __torch_function__: Any = torch._C._disabled_torch_function_impl
    scale_PQ: Tensor

    @staticmethod
    def of(w_OI: Tensor, scale_PQ: Tensor) -> BlockScaled:
        """Both as they are; ValueError if they do not fit together."""
        blocks = [-(-size // BLOCK) for size in w_OI.shape]
        if w_OI.dtype != FLOAT8 or list(scale_PQ.shape) != blocks:
            raise ValueError(
                f"{w_OI.dtype} {list(w_OI.shape)} with scales {list(scale_PQ.shape)}: not e4m3 with "
                f"scales {blocks}"
            )
        whole = w_OI.as_subclass(BlockScaled)  # type: ignore[no-untyped-call,unused-ignore]
        whole.scale_PQ = scale_PQ
        return whole


def quantize_blocks(w_BOI: Tensor) -> tuple[Tensor, Tensor]:
    """(w float8_e4m3fn, scale fp32 [..., ceil(O / 128), ceil(I / 128)]) of [O, I] or [B, O, I].

    scale = greatest magnitude of the block / 448; the last blocks may be cut off. The same bits on
    every device. Takes a few times the matrix's memory for a moment.
    """
    *_, rows, columns = w_BOI.shape
    padded = F.pad(w_BOI.float(), (0, -columns % BLOCK, 0, -rows % BLOCK))
    blocks = padded.unflatten(-1, (-1, BLOCK)).unflatten(-3, (-1, BLOCK))  # [..., P, 128, Q, 128]
    amax = blocks.abs().amax(dim=(-3, -1)).clamp(min=_LEAST_AMAX)
    scale = amax / torch.full_like(amax, _GREATEST)  # by a number, GPUs multiply with its inverse
    quantized = (blocks / scale[..., :, None, :, None]).to(FLOAT8)
    whole = quantized.flatten(-4, -3).flatten(-2, -1)
    return whole[..., :rows, :columns].contiguous(), scale.contiguous()


def dequantized(w_BOI: Tensor, scale_BPQ: Tensor, first: tuple[int, int] = (0, 0)) -> Tensor:
    """What `quantize_blocks` stands for, in fp32; the matrix may begin at row, column `first` of a block."""
    (row, column), (*_, rows, columns) = first, w_BOI.shape
    spread = scale_BPQ.repeat_interleave(BLOCK, -2).repeat_interleave(BLOCK, -1)
    return w_BOI.float() * spread[..., row : row + rows, column : column + columns]


def plain(w_OI: Tensor) -> Tensor:
    """The numbers themselves: fp32 of a `BlockScaled`, everything else as it is."""
    return dequantized(w_OI, w_OI.scale_PQ) if isinstance(w_OI, BlockScaled) else w_OI


def as_float8(w_OI: Tensor) -> BlockScaled:
    """As it is, or quantised."""
    return w_OI if isinstance(w_OI, BlockScaled) else BlockScaled.of(*quantize_blocks(w_OI))


def store(w_OI: Tensor, into_OI: Tensor, scale_PQ: Tensor | None) -> None:
    """Write a matrix, of whatever kind and device, to memory for e4m3 and scales, or for plain numbers."""
    if scale_PQ is None:
        into_OI.copy_(plain(w_OI))
        return
    w_OI = w_OI if isinstance(w_OI, BlockScaled) else as_float8(w_OI.to(into_OI.device))
    into_OI.copy_(w_OI)
    scale_PQ.copy_(w_OI.scale_PQ)


def line_up(parts: Sequence[Tensor]) -> bool:
    """Whether the blocks of matrices below each other are those of the whole."""
    return all(isinstance(part, BlockScaled) for part in parts) and not any(
        len(part) % BLOCK for part in parts[:-1]
    )


def stacked(parts: Sequence[Tensor]) -> Tensor:
    """Matrices below each other. Where one is `BlockScaled`, the whole is: of the same bytes if the
    parts line up, else quantised again."""
    scaled = [part for part in parts if isinstance(part, BlockScaled)]
    if len(parts) == 1:
        return parts[0]
    if not scaled:
        return torch.cat(list(parts))
    if not line_up(parts):
        return as_float8(torch.cat([plain(part).float() for part in parts]))
    scale_PQ = torch.cat([part.scale_PQ for part in scaled])
    return BlockScaled.of(torch.cat([part.as_subclass(Tensor) for part in scaled]), scale_PQ)


def halves(w_OI: Tensor) -> tuple[Tensor, Tensor]:
    """The upper and the lower half of the rows; quantised again if a block belongs to both."""
    size = len(w_OI) // 2
    if not isinstance(w_OI, BlockScaled):
        return w_OI[:size], w_OI[size:]
    if size % BLOCK:
        numbers = plain(w_OI)
        return as_float8(numbers[:size]), as_float8(numbers[size:])
    upper, lower = w_OI.scale_PQ.chunk(2)
    return BlockScaled.of(w_OI[:size], upper), BlockScaled.of(w_OI[size:], lower)


def has_nan(w: Tensor) -> Tensor:
    """Whether e4m3 bytes have a NaN (0x7F or 0xFF): one bool on their device. Kernels that dequantise
    by moving bits would take them for numbers."""
    return ((w.view(torch.uint8) & 0x7F) == 0x7F).any()


@cache
def multiplies_float8(device: torch.device) -> bool:
    """Whether its matrix units take e4m3. A CPU counts as one that does: Triton's interpreter."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 9)
