# ruff: noqa: ANN001, ANN201, ANN202, E741  (what Triton compiles has no Python types; I: intermediate)
"""down on a Hopper GPU: the same sums in the same order, more of them at once.

A program takes 64 or 128 rows and out-features in two blocks of 64 or 128. One warp fetches, one or two
groups of four multiply 64 rows each (experts/kernels/hopper.py).

Legend: as experts/kernels/down.py.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from experts.kernels.hopper import (
    HALF,
    all_slots,
    copy_tile,
    copy_weights,
    let_next_start,
    make_ring,
    tile_of,
    wait_for_inputs,
)
from experts.kernels.hopper_sums import (
    pass_over,
    pass_turn,
    sums_of_bfloat16,
    sums_of_float8,
    take_turn,
)


@gluon.jit  # type: ignore[untyped-decorator,unused-ignore]
def hopper_down(  # type: ignore[no-untyped-def]
    h, h_scale, w2, w2_scale, buffers, ends, y, num_places, num_slots,
    H: gl.constexpr, I: gl.constexpr, SLOTS: gl.constexpr, X8: gl.constexpr,
    ROWS: gl.constexpr, FEATURES: gl.constexpr, DEPTH: gl.constexpr, STAGES: gl.constexpr,
    EARLY: gl.constexpr,
):  # fmt: skip
    ring = make_ring(gl.float8e4nv if X8 else gl.bfloat16, 1, ROWS, FEATURES, DEPTH, STAGES)
    table = (ends, buffers, num_slots)
    rest = (h_scale, w2_scale, y, num_places)
    if ROWS == 2 * HALF:
        gl.warp_specialize(
            [
                (_multiply, (ring, table, rest, 0, H, I, SLOTS, X8, ROWS, FEATURES, STAGES, EARLY)),
                (_multiply, (ring, table, rest, 1, H, I, SLOTS, X8, ROWS, FEATURES, STAGES, EARLY)),
                (_fetch, (ring, table, h, w2, H, I, SLOTS, ROWS, FEATURES, DEPTH, STAGES, EARLY)),
            ],
            [4, 1],
            [232, 40],  # registers: those that multiply hold two tiles of sums
        )
    else:
        gl.warp_specialize(
            [
                (_multiply, (ring, table, rest, 0, H, I, SLOTS, X8, ROWS, FEATURES, STAGES, EARLY)),
                (_fetch, (ring, table, h, w2, H, I, SLOTS, ROWS, FEATURES, DEPTH, STAGES, EARLY)),
            ],
            [1],
            [40],
        )


@gluon.jit  # type: ignore[untyped-decorator,unused-ignore]
def _fetch(  # type: ignore[no-untyped-def]
    ring, table, h, w2,
    H: gl.constexpr, I: gl.constexpr, SLOTS: gl.constexpr,
    ROWS: gl.constexpr, FEATURES: gl.constexpr, DEPTH: gl.constexpr, STAGES: gl.constexpr,
    EARLY: gl.constexpr,
):  # fmt: skip
    """Launched early, the first stages get their weights while the kernel before still makes `h`.

    Which weights is known by then: that kernel lets this one start when what it waited for is there,
    the slots' ends among it.
    """
    hs, _weights, full, empty = ring
    ends, buffers, num_slots = table
    num_blocks: gl.constexpr = H // (2 * FEATURES)
    steps: gl.constexpr = I // DEPTH
    stages_ahead: gl.constexpr = min(STAGES, steps)
    stage_bytes: gl.constexpr = (ROWS + 2 * FEATURES) * DEPTH * hs.dtype.primitive_bitwidth // 8
    begin, limit, buffer_S, tiles, until = all_slots(ends, buffers, num_slots, SLOTS, ROWS)
    num_tiles = gl.max(until, 0) * num_blocks
    buffer, block, _first, _end = tile_of(
        gl.program_id(0), begin, limit, buffer_S, tiles, until, num_blocks, ROWS
    )
    some = gl.program_id(0) < num_tiles
    w_row = buffer * H + block * (2 * FEATURES)
    for i in gl.static_range(stages_ahead):
        copy_weights(ring, i, w2, w_row, w_row + FEATURES, i * DEPTH, stage_bytes, FEATURES, some)
    wait_for_inputs(EARLY)
    let_next_start(EARLY)
    step = 0
    for work in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        buffer, block, first, _end = tile_of(
            work, begin, limit, buffer_S, tiles, until, num_blocks, ROWS
        )
        w_row = buffer * H + block * (2 * FEATURES)
        for k in range(steps):
            stage = step % STAGES
            mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
            copy_weights(
                ring, stage, w2, w_row, w_row + FEATURES, k * DEPTH, stage_bytes, FEATURES,
                step >= stages_ahead,
            )  # fmt: skip
            copy_tile(h, [first, k * DEPTH], full.index(stage), hs.index(stage))
            step += 1


@gluon.jit  # type: ignore[untyped-decorator,unused-ignore]
def _multiply(  # type: ignore[no-untyped-def]
    ring, table, rest, PART: gl.constexpr,
    H: gl.constexpr, I: gl.constexpr, SLOTS: gl.constexpr, X8: gl.constexpr,
    ROWS: gl.constexpr, FEATURES: gl.constexpr, STAGES: gl.constexpr, EARLY: gl.constexpr,
):  # fmt: skip
    ends, buffers, num_slots = table
    h_scale, w2_scale, y, num_places = rest
    num_blocks: gl.constexpr = H // (2 * FEATURES)
    turns: gl.constexpr = X8 and ROWS == 2 * HALF and FEATURES == 128
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 32 if X8 else 16])
    wide: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    begin, limit, buffer_S, tiles, until = all_slots(ends, buffers, num_slots, SLOTS, ROWS)
    wait_for_inputs(EARLY)
    if turns and PART == 1:
        pass_turn(PART)
    step = 0
    for work in range(gl.program_id(0), gl.max(until, 0) * num_blocks, gl.num_programs(0)):
        buffer, block, first, end = tile_of(
            work, begin, limit, buffer_S, tiles, until, num_blocks, ROWS
        )
        first += PART * HALF
        if first >= end:  # a last tile that the other group fills
            step = pass_over(ring, step, I // 128 if X8 else I // 64, PART, STAGES, turns)
        else:
            if X8:
                place = first + gl.arange(0, HALF, gl.SliceLayout(1, mma))
                left_at = w2_scale + ((buffer * H + block * (2 * FEATURES)) // 128) * (I // 128)
                left, right, step = sums_of_float8(
                    ring, step, left_at, left_at + (FEATURES // 128) * (I // 128), h_scale + place,
                    num_places, place < end, PART, I, FEATURES, STAGES, False, turns,
                )  # fmt: skip
            else:
                left, right, step = sums_of_bfloat16(ring, step, PART, I, FEATURES, STAGES, False)
            place_out = first + gl.arange(0, HALF, gl.SliceLayout(1, wide))
            feature = block * (2 * FEATURES) + gl.arange(0, FEATURES, gl.SliceLayout(0, wide))
            y_at = y + (gl.expand_dims(place_out.to(gl.int64) * H, 1) + gl.expand_dims(feature, 0))
            mask = gl.expand_dims(place_out < end, 1)
            gl.store(y_at, gl.convert_layout(left.to(gl.bfloat16), wide), mask=mask)
            gl.store(y_at + FEATURES, gl.convert_layout(right.to(gl.bfloat16), wide), mask=mask)
    if turns and PART == 0:
        take_turn(PART)  # the last one passed
