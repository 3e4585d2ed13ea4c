# ruff: noqa: ANN001, ANN201, ANN202, E741  (what Triton compiles has no Python types; I: intermediate)
"""down for many rows on a Hopper GPU: the same sums in the same order, more of them at once.

A program takes 128 rows and 256 out-features, in two blocks. One warp fetches, two groups of four
multiply 64 rows each (experts/kernels/hopper.py).

Legend: as experts/kernels/down.py.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from experts.kernels.hopper import all_slots, copy_tile, tile_of


@gluon.jit  # type: ignore[untyped-decorator,unused-ignore]
def hopper_down(  # type: ignore[no-untyped-def]
    h, h_scale, w2, w2_scale, buffers, ends, y, num_places, num_slots,
    H: gl.constexpr, I: gl.constexpr, SLOTS: gl.constexpr, X8: gl.constexpr,
    ROWS: gl.constexpr, FEATURES: gl.constexpr, DEPTH: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = gl.float8e4nv if X8 else gl.bfloat16
    shared: gl.constexpr = gl.NVMMASharedLayout(128, 8 if X8 else 16, 2)
    hs = gl.allocate_shared_memory(dtype, [STAGES, ROWS, DEPTH], shared)
    lefts = gl.allocate_shared_memory(dtype, [STAGES, FEATURES, DEPTH], shared)
    rights = gl.allocate_shared_memory(dtype, [STAGES, FEATURES, DEPTH], shared)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    fence_async_shared()
    ring = (hs, lefts, rights, full, empty)
    table = (ends, buffers, num_slots)
    rest = (h_scale, w2_scale, y, num_places)
    gl.warp_specialize(
        [
            (_multiply, (ring, table, rest, 0, H, I, SLOTS, X8, ROWS, FEATURES, STAGES)),
            (_multiply, (ring, table, rest, 1, H, I, SLOTS, X8, ROWS, FEATURES, STAGES)),
            (_fetch, (ring, table, h, w2, H, I, SLOTS, ROWS, FEATURES, DEPTH, STAGES)),
        ],
        [4, 1],
        [232, 40],  # registers: those that multiply hold two tiles of sums
    )


@gluon.jit  # type: ignore[untyped-decorator,unused-ignore]
def _fetch(  # type: ignore[no-untyped-def]
    ring, table, h, w2,
    H: gl.constexpr, I: gl.constexpr, SLOTS: gl.constexpr,
    ROWS: gl.constexpr, FEATURES: gl.constexpr, DEPTH: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    hs, lefts, rights, full, empty = ring
    ends, buffers, num_slots = table
    num_blocks: gl.constexpr = H // (2 * FEATURES)
    stage_bytes: gl.constexpr = (ROWS + 2 * FEATURES) * DEPTH * hs.dtype.primitive_bitwidth // 8
    begin, limit, buffer_S, tiles, until = all_slots(ends, buffers, num_slots, SLOTS, ROWS)
    step = 0
    for work in range(gl.program_id(0), gl.max(until, 0) * num_blocks, gl.num_programs(0)):
        buffer, block, first, _end = tile_of(
            work, begin, limit, buffer_S, tiles, until, num_blocks, ROWS
        )
        w_row = buffer * H + block * (2 * FEATURES)
        for k in range(I // DEPTH):
            stage = step % STAGES
            mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
            mbarrier.expect(full.index(stage), stage_bytes)
            copy_tile(w2, [w_row, k * DEPTH], full.index(stage), lefts.index(stage))
            copy_tile(w2, [w_row + FEATURES, k * DEPTH], full.index(stage), rights.index(stage))
            copy_tile(h, [first, k * DEPTH], full.index(stage), hs.index(stage))
            step += 1


@gluon.jit  # type: ignore[untyped-decorator,unused-ignore]
def _multiply(  # type: ignore[no-untyped-def]
    ring, table, rest, PART: gl.constexpr,
    H: gl.constexpr, I: gl.constexpr, SLOTS: gl.constexpr, X8: gl.constexpr,
    ROWS: gl.constexpr, FEATURES: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    hs, lefts, rights, full, empty = ring
    ends, buffers, num_slots = table
    h_scale, w2_scale, y, num_places = rest
    num_blocks: gl.constexpr = H // (2 * FEATURES)
    half: gl.constexpr = ROWS // 2
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, FEATURES, 32 if X8 else 16])
    wide: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    begin, limit, buffer_S, tiles, until = all_slots(ends, buffers, num_slots, SLOTS, ROWS)
    step = 0
    for work in range(gl.program_id(0), gl.max(until, 0) * num_blocks, gl.num_programs(0)):
        buffer, block, first, end = tile_of(
            work, begin, limit, buffer_S, tiles, until, num_blocks, ROWS
        )
        first += PART * half
        left = gl.zeros([half, FEATURES], gl.float32, mma)
        right = gl.zeros([half, FEATURES], gl.float32, mma)
        if X8:
            blocks_in: gl.constexpr = I // 128
            nothing = gl.zeros([half, FEATURES], gl.float32, mma)
            place = first + gl.arange(0, half, gl.SliceLayout(1, mma))
            here = place < end
            left_at = w2_scale + ((buffer * H + block * (2 * FEATURES)) // 128) * blocks_in
            right_at = left_at + (FEATURES // 128) * blocks_in
            row_at = h_scale + place
            left_scale = gl.load(left_at)
            right_scale = gl.load(right_at)
            row_scale = gl.load(row_at, mask=here, other=0.0)
            for k in range(blocks_in):
                ahead = gl.minimum(k + 1, blocks_in - 1)
                next_left_scale = gl.load(left_at + ahead)
                next_right_scale = gl.load(right_at + ahead)
                next_row_scale = gl.load(
                    row_at + ahead.to(gl.int64) * num_places, mask=here, other=0.0
                )
                stage = step % STAGES
                mbarrier.wait(full.index(stage), (step // STAGES) & 1)
                h_tile = hs.index(stage).slice(PART * half, half, 0)
                sums = warpgroup_mma(
                    h_tile,
                    lefts.index(stage).permute((1, 0)),
                    nothing,
                    use_acc=False,
                    is_async=True,
                )
                sums = warpgroup_mma_wait(0, deps=(sums,))
                left += sums * gl.expand_dims(row_scale * left_scale, 1)
                sums = warpgroup_mma(
                    h_tile,
                    rights.index(stage).permute((1, 0)),
                    nothing,
                    use_acc=False,
                    is_async=True,
                )
                sums = warpgroup_mma_wait(0, deps=(sums,))
                mbarrier.arrive(empty.index(stage), count=1)
                right += sums * gl.expand_dims(row_scale * right_scale, 1)
                left_scale = next_left_scale
                right_scale = next_right_scale
                row_scale = next_row_scale
                step += 1
        else:
            for _k in range(I // 64):
                stage = step % STAGES
                mbarrier.wait(full.index(stage), (step // STAGES) & 1)
                h_tile = hs.index(stage).slice(PART * half, half, 0)
                left_sums = warpgroup_mma(
                    h_tile, lefts.index(stage).permute((1, 0)), left, is_async=True
                )
                right_sums = warpgroup_mma(
                    h_tile, rights.index(stage).permute((1, 0)), right, is_async=True
                )
                left, right = warpgroup_mma_wait(0, deps=(left_sums, right_sums))
                mbarrier.arrive(empty.index(stage), count=1)
                step += 1
        place_out = first + gl.arange(0, half, gl.SliceLayout(1, wide))
        feature = block * (2 * FEATURES) + gl.arange(0, FEATURES, gl.SliceLayout(0, wide))
        y_at = y + (gl.expand_dims(place_out.to(gl.int64) * H, 1) + gl.expand_dims(feature, 0))
        mask = gl.expand_dims(place_out < end, 1)
        gl.store(y_at, gl.convert_layout(left.to(gl.bfloat16), wide), mask=mask)
        gl.store(y_at + FEATURES, gl.convert_layout(right.to(gl.bfloat16), wide), mask=mask)
