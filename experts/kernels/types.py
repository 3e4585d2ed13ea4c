"""What the kernels of the experts pass to each other. Everything lives on one device and has static shapes.

Legend: R rows, H hidden, B blocks of 128 channels or weight buffers, K experts per token, P = R * K
pairs, S slots, N = 2I rows of gate and up, I intermediate.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 128
"""Channels that share a scale; weights share one per BLOCK x BLOCK."""


@dataclass(frozen=True, kw_only=True)
class QuantizedRows:
    """Rows as x = q * scale: q_RH float8_e4m3fn, scale_RB fp32, one for each 128 channels."""

    q_RH: Tensor
    scale_RB: Tensor

    @staticmethod
    def empty(num_rows: int, hidden: int, device: torch.device) -> QuantizedRows:
        """Room for such rows. Raises ValueError if hidden is no multiple of 128."""
        if hidden % BLOCK:
            raise ValueError(f"rows of {hidden} channels, no multiple of {BLOCK}, have no FP8 form")
        return QuantizedRows(
            q_RH=torch.empty(num_rows, hidden, dtype=torch.float8_e4m3fn, device=device),
            scale_RB=torch.empty(num_rows, hidden // BLOCK, device=device),
        )


def parts_of(rows: QuantizedRows | None) -> tuple[Tensor | None, Tensor | None]:
    """(q, scale) for a kernel that may have such rows, or not."""
    return (None, None) if rows is None else (rows.q_RH, rows.scale_RB)


class NormedRows(NamedTuple):
    """Rows that a norm made: x_RH bf16, and the same quantised where matrices of FP8 read them."""

    x_RH: Tensor
    quantized: QuantizedRows | None = None

    def for_matrix(self, *, float8: bool) -> Tensor | QuantizedRows:
        """As a matrix, of FP8 or not, reads them soonest."""
        return self.quantized if float8 and self.quantized else self.x_RH


@dataclass(frozen=True, kw_only=True)
class SortedPairs:
    """The (row, k) pairs that have a slot here, sorted by slot, then row-major.

    pair_P: int32, the flat index row * K + k of the pair in each place, -1 in places beyond the last.
    place_RK: int32, the place of each pair, -1 where it has no slot here. ends_S: int32, how many
    pairs slots 0..s have together; the last one is the number of pairs, which no host ever reads.
    """

    pair_P: Tensor
    place_RK: Tensor
    ends_S: Tensor

    @property
    def num_topk(self) -> int:
        return self.place_RK.shape[1]


@dataclass(frozen=True, kw_only=True)
class DeviceExperts:
    """A pool of buffers with one expert's weights each, and which of them every slot reads.

    w13_BNH [B, 2I, H]: gate rows, then up rows; w2_BHI [B, H, I]; bfloat16, or float8_e4m3fn with an
    fp32 scale for each 128 x 128 of them. buffer_S: int32. To change the expert of a slot is to fill a
    spare buffer and then, between two steps, to write one number.
    """

    w13_BNH: Tensor
    w2_BHI: Tensor
    buffer_S: Tensor
    w13_scale: Tensor | None = None
    w2_scale: Tensor | None = None

    def __post_init__(self) -> None:
        _, num_rows, hidden = self.w13_BNH.shape
        if num_rows % 2 or tuple(self.w2_BHI.shape[1:]) != (hidden, num_rows // 2):
            raise ValueError(
                f"w13 {list(self.w13_BNH.shape)} and w2 {list(self.w2_BHI.shape)} are not "
                "[B, 2I, H] and [B, H, I]"
            )
        if self.is_float8 != (self.w13_scale is not None and self.w2_scale is not None):
            raise ValueError("float8_e4m3fn weights, and only they, come with scales")

    @property
    def is_float8(self) -> bool:
        return self.w13_BNH.dtype == torch.float8_e4m3fn

    @property
    def hidden(self) -> int:
        return self.w13_BNH.shape[2]

    @property
    def intermediate(self) -> int:
        return self.w2_BHI.shape[2]

    @property
    def num_slots(self) -> int:
        return self.buffer_S.shape[0]
