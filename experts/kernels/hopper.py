# ruff: noqa: ANN001, ANN201, ANN202  (what Triton compiles has no Python types)
"""What the warp-specialised kernels share: written in Gluon, Triton's lower level, for Hopper GPUs.

One group of four warps fetches tiles into a ring of stages in shared memory, two others multiply what
has arrived: while one of those adds its tile's sums to fp32 the tensor cores work for the other. Each
stage has two barriers: `full` says that its bytes are there, `empty` that both have read them.

Legend: S slots, as experts/kernels/tiles.py.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import tma

HALF = 64
"""Rows of each of the two groups that multiply: what one tensor core instruction takes."""

# Triton 3.9 has renamed both.
copy_tile = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
copy_rows = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared


@gluon.jit  # type: ignore[untyped-decorator,unused-ignore]
def _add(a, b):  # type: ignore[no-untyped-def]
    return a + b


@gluon.jit  # type: ignore[untyped-decorator,unused-ignore]
def all_slots(ends, buffers, num_slots, SLOTS: gl.constexpr, ROWS: gl.constexpr):  # type: ignore[no-untyped-def]
    """As experts/kernels/tiles.py has it."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    slot = gl.arange(0, SLOTS, layout)
    here = slot < num_slots
    end = gl.load(ends + slot, mask=here, other=0)
    begin = gl.load(ends + slot - 1, mask=here & (slot > 0), other=0)
    buffer = gl.load(buffers + slot, mask=here, other=0)
    tiles = (end - begin + ROWS - 1) // ROWS
    return begin, end, buffer, tiles, gl.associative_scan(tiles, 0, _add)


@gluon.jit  # type: ignore[untyped-decorator,unused-ignore]
def tile_of(  # type: ignore[no-untyped-def]
    work, begin, end, buffer, tiles, until, num_blocks: gl.constexpr, ROWS: gl.constexpr
):
    """As experts/kernels/tiles.py has it."""
    mine = (until * num_blocks > work) & ((until - tiles) * num_blocks <= work)
    tiles_here = gl.sum(gl.where(mine, tiles, 0), 0)
    inside = work - gl.sum(gl.where(mine, until - tiles, 0), 0) * num_blocks
    first = gl.sum(gl.where(mine, begin, 0), 0) + inside % tiles_here * ROWS
    return (
        gl.sum(gl.where(mine, buffer, 0), 0),
        inside // tiles_here,
        first,
        gl.sum(gl.where(mine, end, 0), 0),
    )
