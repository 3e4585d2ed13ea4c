# ruff: noqa: ANN001, ANN201, ANN202, E741, SIM113  (what Triton compiles has no Python types; I: intermediate)
"""gate_up of FP8 experts for some rows each on a Hopper GPU: the same sums in the same order.

A program takes 64 rows and 128 channels of gate and of up. Both groups of warps that multiply share the
rows; one sums gate, the other up, which it hands over through shared memory at the end of a tile.

Legend: as experts/kernels/gate_up.py.
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

from experts.kernels.hopper import all_slots, tile_of
from experts.kernels.hopper_gate_up import fetch_rows_and_weights


@gluon.jit  # type: ignore[untyped-decorator,unused-ignore]
def hopper_gate_up_few(  # type: ignore[no-untyped-def]
    x, x_scale, w13, w13_scale, buffers, ends, pairs, h, h_scale, num_places, num_slots,
    H: gl.constexpr, I: gl.constexpr, K: gl.constexpr, SLOTS: gl.constexpr, X8: gl.constexpr,
    ROWS: gl.constexpr, FEATURES: gl.constexpr, DEPTH: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    gl.static_assert(X8)
    shared: gl.constexpr = gl.NVMMASharedLayout(128, 8, 2)
    plain: gl.constexpr = gl.SwizzledSharedLayout(4, 1, 8, [1, 0])
    xs = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, ROWS, DEPTH], shared)
    gates = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, FEATURES, DEPTH], shared)
    ups = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, FEATURES, DEPTH], shared)
    handed = gl.allocate_shared_memory(gl.float32, [ROWS, FEATURES], plain)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    given = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    taken = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1 + 128)  # weights; each thread's part of the rows
        mbarrier.init(empty.index(i), count=2)
    mbarrier.init(given, count=1)
    mbarrier.init(taken, count=1)
    fence_async_shared()
    ring = (xs, gates, ups, full, empty)
    gate_ring = (xs, gates, full, empty)
    up_ring = (xs, ups, full, empty)
    hand = (handed, given, taken)
    table = (ends, buffers, pairs, num_slots)
    rest = (x_scale, w13_scale, h, h_scale, num_places)
    gl.warp_specialize(
        [
            (_multiply, (gate_ring, hand, table, rest, 0, H, I, K, SLOTS, ROWS, FEATURES, STAGES)),
            (_multiply, (up_ring, hand, table, rest, 1, H, I, K, SLOTS, ROWS, FEATURES, STAGES)),
            (
                fetch_rows_and_weights,
                (ring, table, x, w13, H, I, K, SLOTS, ROWS, FEATURES, DEPTH, STAGES),
            ),
        ],
        [4, 4],
        [224, 56],
    )


@gluon.jit  # type: ignore[untyped-decorator,unused-ignore]
def _multiply(  # type: ignore[no-untyped-def]
    ring, hand, table, rest, IS_UP: gl.constexpr,
    H: gl.constexpr, I: gl.constexpr, K: gl.constexpr, SLOTS: gl.constexpr,
    ROWS: gl.constexpr, FEATURES: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    xs, weights, full, empty = ring
    handed, given, taken = hand
    ends, buffers, pairs, num_slots = table
    x_scale, w13_scale, h, h_scale, num_places = rest
    num_blocks: gl.constexpr = I // FEATURES
    blocks_in: gl.constexpr = H // 128
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, FEATURES, 32])
    wide: gl.constexpr = gl.BlockedLayout([1, 16], [4, 8], [4, 1], [1, 0])
    nothing = gl.zeros([ROWS, FEATURES], gl.float32, mma)
    begin, limit, buffer_S, tiles, until = all_slots(ends, buffers, num_slots, SLOTS, ROWS)
    step = 0
    done = 0
    for work in range(gl.program_id(0), gl.max(until, 0) * num_blocks, gl.num_programs(0)):
        buffer, block, first, end = tile_of(
            work, begin, limit, buffer_S, tiles, until, num_blocks, ROWS
        )
        place = first + gl.arange(0, ROWS, gl.SliceLayout(1, mma))
        here = place < end
        row = (gl.load(pairs + place, mask=here, other=0) // K).to(gl.int64)
        row_at = x_scale + row * blocks_in
        w_row = buffer * (2 * I) + IS_UP * I + block * FEATURES
        w_at = w13_scale + (w_row // 128) * blocks_in
        w_scale = gl.load(w_at)
        row_scale = gl.load(row_at, mask=here, other=0.0)
        acc = gl.zeros([ROWS, FEATURES], gl.float32, mma)
        for k in range(blocks_in):
            ahead = gl.minimum(k + 1, blocks_in - 1)
            next_w_scale = gl.load(w_at + ahead)
            next_row_scale = gl.load(row_at + ahead, mask=here, other=0.0)
            stage = step % STAGES
            mbarrier.wait(full.index(stage), (step // STAGES) & 1)
            fence_async_shared()
            w_tile = weights.index(stage).permute((1, 0))
            sums = warpgroup_mma(xs.index(stage), w_tile, nothing, use_acc=False, is_async=True)
            sums = warpgroup_mma_wait(0, deps=(sums,))
            mbarrier.arrive(empty.index(stage), count=1)
            acc += sums * gl.expand_dims(row_scale * w_scale, 1)
            w_scale = next_w_scale
            row_scale = next_row_scale
            step += 1
        if IS_UP:
            mbarrier.wait(taken, (done & 1) ^ 1)
            handed.store(acc)
            mbarrier.arrive(given, count=1)
        else:
            mbarrier.wait(given, done & 1)
            up = handed.load(mma)
            mbarrier.arrive(taken, count=1)
            hidden = acc / (1.0 + gl.exp(-acc)) * up
            scale = gl.div_rn(gl.maximum(gl.max(gl.abs(hidden), 1), 1e-4), 448.0)
            gl.store(h_scale + block.to(gl.int64) * num_places + place, scale, mask=here)
            q = gl.div_rn(hidden, gl.expand_dims(scale, 1)).to(gl.float8e4nv)
            place_out = first + gl.arange(0, ROWS, gl.SliceLayout(1, wide))
            channel = block * FEATURES + gl.arange(0, FEATURES, gl.SliceLayout(0, wide))
            h_at = h + (gl.expand_dims(place_out.to(gl.int64) * I, 1) + gl.expand_dims(channel, 0))
            gl.store(h_at, gl.convert_layout(q, wide), mask=gl.expand_dims(place_out < end, 1))
        done += 1
