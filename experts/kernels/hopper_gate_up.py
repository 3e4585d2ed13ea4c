# ruff: noqa: ANN001, ANN201, ANN202, E741  (what Triton compiles has no Python types; I: intermediate)
"""gate_up for many rows on a Hopper GPU: the same sums in the same order, more of them at once.

A program takes 128 rows and 128 channels of gate and of up. One group of warps gathers rows and
fetches weights, two multiply 64 rows each (experts/kernels/hopper.py).

Legend: as experts/kernels/gate_up.py.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from experts.kernels.hopper import all_slots, copy_rows, copy_tile, tile_of


@gluon.jit  # type: ignore[untyped-decorator,unused-ignore]
def hopper_gate_up(  # type: ignore[no-untyped-def]
    x, x_scale, w13, w13_scale, buffers, ends, pairs, h, h_scale, num_places, num_slots,
    H: gl.constexpr, I: gl.constexpr, K: gl.constexpr, SLOTS: gl.constexpr, X8: gl.constexpr,
    ROWS: gl.constexpr, FEATURES: gl.constexpr, DEPTH: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = gl.float8e4nv if X8 else gl.bfloat16
    shared: gl.constexpr = gl.NVMMASharedLayout(128, 8 if X8 else 16, 2)
    xs = gl.allocate_shared_memory(dtype, [STAGES, ROWS, DEPTH], shared)
    gates = gl.allocate_shared_memory(dtype, [STAGES, FEATURES, DEPTH], shared)
    ups = gl.allocate_shared_memory(dtype, [STAGES, FEATURES, DEPTH], shared)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1 + 128)  # weights; each thread's part of the rows
        mbarrier.init(empty.index(i), count=2)
    fence_async_shared()
    ring = (xs, gates, ups, full, empty)
    table = (ends, buffers, pairs, num_slots)
    rest = (x_scale, w13_scale, h, h_scale, num_places)
    gl.warp_specialize(
        [
            (_multiply, (ring, table, rest, 0, H, I, K, SLOTS, X8, ROWS, FEATURES, STAGES)),
            (_multiply, (ring, table, rest, 1, H, I, K, SLOTS, X8, ROWS, FEATURES, STAGES)),
            (
                fetch_rows_and_weights,
                (ring, table, x, w13, H, I, K, SLOTS, ROWS, FEATURES, DEPTH, STAGES),
            ),
        ],
        [4, 4],
        [224, 56],  # registers: those that multiply hold two tiles of sums
    )


@gluon.jit  # type: ignore[untyped-decorator,unused-ignore]
def fetch_rows_and_weights(  # type: ignore[no-untyped-def]
    ring, table, x, w13,
    H: gl.constexpr, I: gl.constexpr, K: gl.constexpr, SLOTS: gl.constexpr,
    ROWS: gl.constexpr, FEATURES: gl.constexpr, DEPTH: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    xs, gates, ups, full, empty = ring
    ends, buffers, pairs, num_slots = table
    num_blocks: gl.constexpr = I // FEATURES
    bits: gl.constexpr = xs.dtype.primitive_bitwidth
    copies: gl.constexpr = gl.BlockedLayout([1, 128 // bits], [4, 8], [gl.num_warps(), 1], [1, 0])
    inside = gl.arange(0, DEPTH, gl.SliceLayout(0, copies))
    begin, limit, buffer_S, tiles, until = all_slots(ends, buffers, num_slots, SLOTS, ROWS)
    step = 0
    for work in range(gl.program_id(0), gl.max(until, 0) * num_blocks, gl.num_programs(0)):
        buffer, block, first, end = tile_of(
            work, begin, limit, buffer_S, tiles, until, num_blocks, ROWS
        )
        gate_row = buffer * (2 * I) + block * FEATURES
        place = first + gl.arange(0, ROWS, gl.SliceLayout(1, copies))
        here = place < end
        row = gl.load(pairs + place, mask=here, other=0) // K
        x_at = gl.expand_dims(row.to(gl.int64) * H, 1) + gl.expand_dims(inside, 0)
        for k in range(H // DEPTH):
            stage = step % STAGES
            mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
            mbarrier.expect(full.index(stage), 2 * FEATURES * DEPTH * bits // 8)
            copy_tile(w13, [gate_row, k * DEPTH], full.index(stage), gates.index(stage))
            copy_tile(w13, [gate_row + I, k * DEPTH], full.index(stage), ups.index(stage))
            copy_rows(xs.index(stage), x + (x_at + k * DEPTH), mask=gl.expand_dims(here, 1))
            async_copy.mbarrier_arrive(full.index(stage), increment_count=False)
            step += 1


@gluon.jit  # type: ignore[untyped-decorator,unused-ignore]
def _multiply(  # type: ignore[no-untyped-def]
    ring, table, rest, PART: gl.constexpr,
    H: gl.constexpr, I: gl.constexpr, K: gl.constexpr, SLOTS: gl.constexpr, X8: gl.constexpr,
    ROWS: gl.constexpr, FEATURES: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    xs, gates, ups, full, empty = ring
    ends, buffers, pairs, num_slots = table
    x_scale, w13_scale, h, h_scale, num_places = rest
    num_blocks: gl.constexpr = I // FEATURES
    half: gl.constexpr = ROWS // 2
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, FEATURES, 32 if X8 else 16])
    wide: gl.constexpr = gl.BlockedLayout([1, 16 if X8 else 8], [4, 8], [4, 1], [1, 0])
    begin, limit, buffer_S, tiles, until = all_slots(ends, buffers, num_slots, SLOTS, ROWS)
    step = 0
    for work in range(gl.program_id(0), gl.max(until, 0) * num_blocks, gl.num_programs(0)):
        buffer, block, first, end = tile_of(
            work, begin, limit, buffer_S, tiles, until, num_blocks, ROWS
        )
        first += PART * half
        place = first + gl.arange(0, half, gl.SliceLayout(1, mma))
        here = place < end
        gate = gl.zeros([half, FEATURES], gl.float32, mma)
        up = gl.zeros([half, FEATURES], gl.float32, mma)
        if X8:
            blocks_in: gl.constexpr = H // 128
            nothing = gl.zeros([half, FEATURES], gl.float32, mma)
            gate_at = w13_scale + ((buffer * (2 * I) + block * FEATURES) // 128) * blocks_in
            up_at = gate_at + (I // 128) * blocks_in
            row_at = (
                x_scale + (gl.load(pairs + place, mask=here, other=0) // K).to(gl.int64) * blocks_in
            )
            gate_scale = gl.load(gate_at)
            up_scale = gl.load(up_at)
            row_scale = gl.load(row_at, mask=here, other=0.0)
            for k in range(blocks_in):
                ahead = gl.minimum(k + 1, blocks_in - 1)
                next_gate_scale = gl.load(gate_at + ahead)
                next_up_scale = gl.load(up_at + ahead)
                next_row_scale = gl.load(row_at + ahead, mask=here, other=0.0)
                stage = step % STAGES
                mbarrier.wait(full.index(stage), (step // STAGES) & 1)
                fence_async_shared()
                x_tile = xs.index(stage).slice(PART * half, half, 0)
                sums = warpgroup_mma(
                    x_tile,
                    gates.index(stage).permute((1, 0)),
                    nothing,
                    use_acc=False,
                    is_async=True,
                )
                sums = warpgroup_mma_wait(0, deps=(sums,))
                gate += sums * gl.expand_dims(row_scale * gate_scale, 1)
                sums = warpgroup_mma(
                    x_tile, ups.index(stage).permute((1, 0)), nothing, use_acc=False, is_async=True
                )
                sums = warpgroup_mma_wait(0, deps=(sums,))
                mbarrier.arrive(empty.index(stage), count=1)
                up += sums * gl.expand_dims(row_scale * up_scale, 1)
                gate_scale = next_gate_scale
                up_scale = next_up_scale
                row_scale = next_row_scale
                step += 1
            hidden = gate / (1.0 + gl.exp(-gate)) * up
            scale = gl.div_rn(gl.maximum(gl.max(gl.abs(hidden), 1), 1e-4), 448.0)
            gl.store(h_scale + block.to(gl.int64) * num_places + place, scale, mask=here)
            out = gl.div_rn(hidden, gl.expand_dims(scale, 1)).to(gl.float8e4nv)
        else:
            for _k in range(H // 64):
                stage = step % STAGES
                mbarrier.wait(full.index(stage), (step // STAGES) & 1)
                fence_async_shared()
                x_tile = xs.index(stage).slice(PART * half, half, 0)
                gate_sums = warpgroup_mma(
                    x_tile, gates.index(stage).permute((1, 0)), gate, is_async=True
                )
                up_sums = warpgroup_mma(x_tile, ups.index(stage).permute((1, 0)), up, is_async=True)
                gate, up = warpgroup_mma_wait(0, deps=(gate_sums, up_sums))
                mbarrier.arrive(empty.index(stage), count=1)
                step += 1
            gate = gate.to(gl.bfloat16).to(gl.float32)
            up = up.to(gl.bfloat16).to(gl.float32)
            out = (gate / (1.0 + gl.exp(-gate)) * up).to(gl.bfloat16)
        place_out = first + gl.arange(0, half, gl.SliceLayout(1, wide))
        channel = block * FEATURES + gl.arange(0, FEATURES, gl.SliceLayout(0, wide))
        h_at = h + (gl.expand_dims(place_out.to(gl.int64) * I, 1) + gl.expand_dims(channel, 0))
        gl.store(h_at, gl.convert_layout(out, wide), mask=gl.expand_dims(place_out < end, 1))
