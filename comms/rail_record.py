"""What a row looks like on its way to another node: one record of 32-bit words.

    channels   bfloat16 [H], or e4m3 [H]      slots     int32 [K], global, -1 = none
    scales     fp32 [H / 128], float8 only    weights   fp32 [K]
                                              range     fp32, combine "fixed" only

Sums come back as rows of `sum_columns`: bfloat16 [H], or for "fixed" int32 [H] and a word that is not 0
where a pair was refused.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from comms.symmetric_layout import BLOCK, SymmetricLayout

_ALIGNED = 4  # words: 16 bytes go at once


@dataclass(frozen=True)
class RailRecord:
    """Of an exchange whose ranks agree on `layout`."""

    layout: SymmetricLayout

    @property
    def scales_at(self) -> int:
        """Words of the channels."""
        return self.layout.hidden * self.layout.row_dtype.itemsize // 4

    @property
    def slots_at(self) -> int:
        float8 = self.layout.dispatch_dtype == "float8"
        return self.scales_at + (self.layout.hidden // BLOCK if float8 else 0)

    @property
    def words(self) -> int:
        is_ranged = self.layout.combine == "fixed"
        return _rounded(self.slots_at + 2 * self.layout.num_topk + is_ranged)

    @property
    def sum_dtype(self) -> torch.dtype:
        return torch.int32 if self.layout.combine == "fixed" else torch.bfloat16

    @property
    def sum_columns(self) -> int:
        hidden = self.layout.hidden
        return hidden + _ALIGNED if self.layout.combine == "fixed" else hidden


def _rounded(words: int) -> int:
    return -(-words // _ALIGNED) * _ALIGNED
