# ruff: noqa: ANN001, ANN201, ANN202  (what Triton compiles has no Python types)
"""What the warp-specialised kernels share: written in Gluon, Triton's lower level, for Hopper GPUs.

One group of warps fetches tiles into a ring of stages in shared memory: rows, in FP8 with their scales, and
two blocks of weights (of gate and up, or of out-features). Two others multiply what has arrived, 64 rows at
a time. A stage has two barriers: `full` says that its bytes are there, `empty` that all have read them.

Legend: S slots, as experts/kernels/tiles.py.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

HALF: gl.constexpr = gl.constexpr(64)
"""Rows of a group that multiplies: what one tensor core instruction takes."""

# Triton 3.9 has renamed these.
barrier = getattr(gl, "thread_barrier", None) or gl.barrier
copy_tile = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
copy_rows = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared


@gluon.jit  # type: ignore[untyped-decorator,unused-ignore]
def make_ring(  # type: ignore[no-untyped-def]
    dtype: gl.constexpr, ROWS: gl.constexpr, FEATURES: gl.constexpr, DEPTH: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """(rows, their scales, weights, full, empty), each for all stages.

    A stage has two blocks of weights. It is full when these are there, and what each of the 128 threads that
    fetch has asked for.
    """
    layout: gl.constexpr = gl.NVMMASharedLayout(128, dtype.primitive_bitwidth, 2)
    rows = gl.allocate_shared_memory(dtype, [STAGES, ROWS, DEPTH], layout)
    weights = gl.allocate_shared_memory(dtype, [STAGES, 2 * FEATURES, DEPTH], layout)
    scales = gl.allocate_shared_memory(
        gl.float32, [STAGES, ROWS], gl.SwizzledSharedLayout(1, 1, 1, [0])
    )
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1 + 128)
        mbarrier.init(empty.index(i), count=ROWS // HALF)
    fence_async_shared()
    return rows, scales, weights, full, empty


@gluon.jit  # type: ignore[untyped-decorator,unused-ignore]
def copy_weights(  # type: ignore[no-untyped-def]
    ring,
    stage,
    w,
    first_row,
    second_row,
    channel,
    num_bytes: gl.constexpr,
    FEATURES: gl.constexpr,
    wanted,
):
    """Both blocks of a stage, which gets so many bytes in all, if `wanted`."""
    _rows, _scales, weights, full, _empty = ring
    barrier = full.index(stage)
    mbarrier.expect(barrier, num_bytes, pred=wanted)
    both = weights.index(stage)
    copy_tile(w, [first_row, channel], barrier, both.slice(0, FEATURES, 0), pred=wanted)
    copy_tile(w, [second_row, channel], barrier, both.slice(FEATURES, FEATURES, 0), pred=wanted)


@gluon.jit  # type: ignore[untyped-decorator,unused-ignore]
def assembly(instruction: gl.constexpr):  # type: ignore[no-untyped-def]
    """One that has an effect and no result."""
    gl.inline_asm_elementwise(instruction, "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit  # type: ignore[untyped-decorator,unused-ignore]
def _add(a, b):  # type: ignore[no-untyped-def]
    return a + b


@gluon.jit  # type: ignore[untyped-decorator,unused-ignore]
def all_slots(ends, buffers, num_slots, SLOTS: gl.constexpr, ROWS: gl.constexpr):  # type: ignore[no-untyped-def]
    """As experts/kernels/tiles.py has it; of 128 rows, tiles with less than half of them come last.

    So they fill up what the last turn leaves free. SLOTS entries for a slot's other tiles are followed by
    as many for the last one.
    """
    LISTS: gl.constexpr = 2 if ROWS == 2 * HALF else 1
    each: gl.constexpr = LISTS * SLOTS // 32  # every warp has all of them: sums need no other
    layout: gl.constexpr = gl.BlockedLayout([each], [32], [gl.num_warps()], [0])
    entry = gl.arange(0, LISTS * SLOTS, layout)
    slot = entry % SLOTS
    here = slot < num_slots
    end = gl.load(ends + slot, mask=here, other=0)
    begin = gl.load(ends + slot - 1, mask=here & (slot > 0), other=0)
    buffer = gl.load(buffers + slot, mask=here, other=0)
    if LISTS == 2:
        large = (end - begin + HALF - 1) // ROWS
        last = entry >= SLOTS
        begin = gl.where(last, begin + large * ROWS, begin)
        tiles = gl.where(last, (end > begin).to(gl.int32), large)
    else:
        tiles = (end - begin + ROWS - 1) // ROWS
    return begin, end, buffer, tiles, gl.associative_scan(tiles, 0, _add)


@gluon.jit  # type: ignore[untyped-decorator,unused-ignore]
def tile_of(work, slots, num_blocks: gl.constexpr, ROWS: gl.constexpr):  # type: ignore[no-untyped-def]
    """(number of the tile of rows, buffer, block, first place, end): as experts/kernels/tiles.py has it."""
    begin, end, buffer, tiles, until = slots
    mine = (until * num_blocks > work) & ((until - tiles) * num_blocks <= work)
    tiles_here = gl.maximum(gl.sum(gl.where(mine, tiles, 0), 0), 1)
    before = gl.sum(gl.where(mine, until - tiles, 0), 0)
    inside = work - before * num_blocks
    tile = inside % tiles_here
    return (
        before + tile,
        gl.sum(gl.where(mine, buffer, 0), 0),
        inside // tiles_here,
        gl.sum(gl.where(mine, begin, 0), 0) + tile * ROWS,
        gl.sum(gl.where(mine, end, 0), 0),
    )


@gluon.jit  # type: ignore[untyped-decorator,unused-ignore]
def start_after(num_works):  # type: ignore[no-untyped-def]
    """Programs take pieces of work in turns: which of those after the first so many is this one's first."""
    program, programs = gl.program_id(0), gl.num_programs(0)
    taken = gl.maximum(num_works - program + programs - 1, 0) // programs
    return program + taken * programs - num_works


@gluon.jit  # type: ignore[untyped-decorator,unused-ignore]
def store_rows(to, values, first, end, column, WIDTH: gl.constexpr):  # type: ignore[no-untyped-def]
    """A group's values [64, N] as rows `first` on of a matrix of WIDTH columns, from `column` on.

    Those from `end` on are not stored.
    """
    each: gl.constexpr = 128 // values.dtype.primitive_bitwidth
    wide: gl.constexpr = gl.BlockedLayout([1, each], [each // 2, 64 // each], [4, 1], [1, 0])
    row = first + gl.arange(0, HALF, gl.SliceLayout(1, wide))
    columns = column + gl.arange(0, values.shape[1], gl.SliceLayout(0, wide))
    at = gl.expand_dims(row.to(gl.int64) * WIDTH, 1) + gl.expand_dims(columns, 0)
    gl.store(to + at, gl.convert_layout(values, wide), mask=gl.expand_dims(row < end, 1))
