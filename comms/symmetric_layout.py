"""Where everything lies in the memory that a rank shares with the ranks of its node.

Legend: W ranks, C capacity (most tokens of a rank), K top-k, H hidden, B blocks of 128 channels.

Two buffers take turns, each with these regions of [W, C, ...], by source rank (dispatch: where tokens
come from, combine: where sums come from), then the flags that say what has arrived:

    rows      bfloat16 or e4m3 [H]      slots     int32 [K]      partials  bfloat16 or int16 [H]
    scales    fp32 [B], float8 only     weights   fp32 [K]       wide      int32 [H], fixed only
                                        ranges    fp32, fixed    forms     int32, fixed only

A node of several (`of_several`) has partials in fp32, in `wide`, unless they are integers.
"""

from dataclasses import dataclass
from typing import Literal

import torch

BUFFERS = 2
ALIGNMENT = 128
BLOCK = 128
PROGRAMS = 1024  # of a kernel at most: each has a flag of its own

DispatchDtype = Literal["bfloat16", "float8"]
SumMode = Literal["node", "fixed"]


@dataclass(frozen=True, kw_only=True)
class SymmetricLayout:
    """What all ranks of a node agree on. Raises ValueError for what the kernels cannot do.

    of_several: this node is one of several, whose sums are still to be added up (`comms/nodes.py`).
    """

    world_size: int
    slots_per_rank: int
    hidden: int
    num_topk: int
    capacity: int
    dispatch_dtype: DispatchDtype = "bfloat16"
    combine: SumMode = "node"
    of_several: bool = False

    def __post_init__(self) -> None:
        if self.dispatch_dtype not in ("bfloat16", "float8"):
            raise ValueError(
                f"dispatch_dtype on GPUs must be bfloat16 or float8, got {self.dispatch_dtype!r}"
            )
        if self.combine not in ("node", "fixed"):
            raise ValueError(f"combine on GPUs must be node or fixed, got {self.combine!r}")
        least = min(self.world_size, self.slots_per_rank, self.num_topk, self.capacity)
        if least < 1 or self.capacity >= 1 << 24:
            raise ValueError(
                "need world_size, slots_per_rank, num_topk >= 1 and 1 <= capacity < 2^24, got "
                f"{self.world_size}, {self.slots_per_rank}, {self.num_topk}, {self.capacity}"
            )
        if self.hidden < 1 or self.hidden % BLOCK:
            raise ValueError(f"hidden must be a multiple of {BLOCK}, got {self.hidden}")

    @property
    def row_dtype(self) -> torch.dtype:
        return torch.float8_e4m3fn if self.dispatch_dtype == "float8" else torch.bfloat16

    @property
    def row_bytes(self) -> int:
        """Of a row that goes to a rank: channels, scales, weights and range. Slots go to every rank."""
        float8, fixed = self.dispatch_dtype == "float8", self.combine == "fixed"
        scales = self.hidden // BLOCK * 4 if float8 else 0
        return self.hidden * self.row_dtype.itemsize + scales + 4 * self.num_topk + 4 * fixed

    @property
    def region_bytes(self) -> tuple[int, ...]:
        """Of each region of one buffer, in the order of `comms/kernels/regions.py`."""
        rows = self.world_size * self.capacity
        float8, fixed = self.dispatch_dtype == "float8", self.combine == "fixed"
        is_wide = fixed or self.of_several
        sizes = (
            rows * self.hidden * self.row_dtype.itemsize,
            rows * (self.hidden // BLOCK) * 4 if float8 else 0,
            rows * self.num_topk * 4,
            rows * self.num_topk * 4,
            rows * 4 if fixed else 0,
            rows * self.hidden * 2 if fixed or not self.of_several else 0,
            rows * self.hidden * 4 if is_wide else 0,
            rows * 4 if fixed else 0,
            self.world_size * PROGRAMS * 8,
            self.world_size * PROGRAMS * 8,
        )
        return tuple(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes)

    @property
    def num_bytes(self) -> int:
        return BUFFERS * sum(self.region_bytes)

    def offsets(self, buffer: int) -> tuple[int, ...]:
        """Of each region in the shared memory."""
        sizes = self.region_bytes
        start = buffer * sum(sizes)
        return tuple(start + sum(sizes[:i]) for i in range(len(sizes)))
