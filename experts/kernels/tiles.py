# ruff: noqa: ANN001, ANN201  (what Triton compiles has no Python types)
"""Which slot's rows, and which of its out-features, a program of a grouped product works on.

A grid covers all slots' tiles without the host knowing how many rows any slot has: programs take the
tiles in turns, and those beyond the last end at once. All tiles of a slot follow each other, and
those of one block of out-features directly, so that a weight is read from memory once and from the
L2 cache by the rest.

Legend: S slots, P = R * K places.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """How a grouped product is cut: `rows` x `features` a program, `depth` in-features at a time.

    `programs` a multiprocessor may run at once. Programs of the kernel for Hopper GPUs
    (experts/kernels/hopper_ffn.py) take two blocks of `features` each.
    Nothing here but `depth` changes a bit of a result (see tests/gpu/test_grouped_tiles.py).
    """

    rows: int
    features: int
    depth: int
    stages: int
    warps: int = 4
    programs: int = 1


def most_tiles(num_places: int, num_slots: int, tiles: Tiles) -> int:
    """Tiles of rows that the slots can have together, whatever their counts."""
    return min(num_places, num_places // tiles.rows + num_slots)


def slots_entries(num_slots: int) -> int:
    """Slots that a program looks through: kernels are compiled for powers of 2 from 32 on."""
    return max(32, 1 << (num_slots - 1).bit_length())


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def all_slots(ends, buffers, num_slots, SLOTS: tl.constexpr, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
    """(first place, end, buffer, tiles of rows, tiles up to and with it) of each slot, read at once.

    What a tile needs is then picked from registers: a chain of small reads before the first weight
    would take as long as a good part of a decode step's product. SLOTS is a power of 2.
    """
    slot = tl.arange(0, SLOTS)
    here = slot < num_slots
    end = tl.load(ends + slot, mask=here, other=0)
    begin = tl.load(ends + slot - 1, mask=here & (slot > 0), other=0)
    buffer = tl.load(buffers + slot, mask=here, other=0)
    tiles = (end - begin + ROWS - 1) // ROWS
    return begin, end, buffer, tiles, tl.cumsum(tiles, 0)


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def tile_of(  # type: ignore[no-untyped-def]
    work, begin, end, buffer, tiles, until, num_blocks: tl.constexpr, ROWS: tl.constexpr
):
    """(buffer, block of out-features, first place, end of its slot's places) of the tile `work`."""
    mine = (until * num_blocks > work) & ((until - tiles) * num_blocks <= work)
    tiles_here = tl.sum(tl.where(mine, tiles, 0), 0)
    inside = work - tl.sum(tl.where(mine, until - tiles, 0), 0) * num_blocks
    first = tl.sum(tl.where(mine, begin, 0), 0) + inside % tiles_here * ROWS
    return (
        tl.sum(tl.where(mine, buffer, 0), 0),
        inside // tiles_here,
        first,
        tl.sum(tl.where(mine, end, 0), 0),
    )
