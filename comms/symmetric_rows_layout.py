"""What the ranks of a replica share for the rows that pass between them, see `comms/symmetric_rows.py`.

Legend: T rows of the replica, H hidden, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from comms.symmetric_layout import ALIGNMENT, PROGRAMS

KINDS = ("gather", "scatter", "logits")
"""Of moves, each with flags of its own."""

LOGIT_ROWS = 256
"""Whose logits are exchanged at a time."""


class Norm(NamedTuple):
    """RMS norm: weight [H] bfloat16, and what is added to the mean square."""

    weight: Tensor
    eps: float


@dataclass(frozen=True, kw_only=True)
class RowsLayout:
    """What the ranks of a replica agree on. capacity: T at most. One region after the other: rows [T, H],
    parts [T, H], two of logits [LOGIT_ROWS, V], all bfloat16, and flags by kind."""

    world_size: int
    hidden: int
    vocab_size: int
    capacity: int

    def __post_init__(self) -> None:
        if min(self.world_size, self.hidden, self.vocab_size, self.capacity) < 1:
            raise ValueError(f"sizes of at least 1, got {self}")
        if self.capacity >= 1 << 24:
            raise ValueError(f"capacity must be < 2^24, got {self.capacity}")

    @property
    def region_bytes(self) -> tuple[int, ...]:
        rows = -(-self.capacity // self.world_size) * self.world_size * self.hidden * 2
        flags = self.world_size * PROGRAMS * 8
        sizes = (rows, rows, 2 * LOGIT_ROWS * self.vocab_size * 2, *[flags] * len(KINDS))
        return tuple(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes)

    @property
    def num_bytes(self) -> int:
        return sum(self.region_bytes)
