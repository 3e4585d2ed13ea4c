# ruff: noqa: ANN001, ANN201, ANN202, E741  (what Triton compiles has no Python types; I: intermediate)
"""gate_up on a Hopper GPU: the same sums in the same order, more of them at once.

A program takes 64 or 128 rows and 64 or 128 channels of gate and of up. One group of warps gathers rows
and fetches weights, one or two multiply 64 rows each (experts/kernels/hopper.py).

Four experts with tiles of 128 channels are 64 programs, too few to read weights as fast as memory gives
them. With 64 channels each of two neighbours has half of the 128 that share a scale, and they tell each
other their rows' greatest magnitudes (experts/kernels/hopper_quantize.py).

Legend: as experts/kernels/gate_up.py.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from experts.kernels.hopper import (
    HALF,
    all_slots,
    copy_rows,
    copy_weights,
    let_next_start,
    make_ring,
    tile_of,
    wait_for_inputs,
)
from experts.kernels.hopper_quantize import quantize_tile
from experts.kernels.hopper_sums import (
    pass_over,
    pass_turn,
    sums_of_bfloat16,
    sums_of_float8,
    take_turn,
)


@gluon.jit  # type: ignore[untyped-decorator,unused-ignore]
def hopper_gate_up(  # type: ignore[no-untyped-def]
    x, x_scale, w13, w13_scale, buffers, ends, pairs, h, h_scale, told, num_places, num_slots,
    H: gl.constexpr, I: gl.constexpr, K: gl.constexpr, SLOTS: gl.constexpr, X8: gl.constexpr,
    ROWS: gl.constexpr, FEATURES: gl.constexpr, DEPTH: gl.constexpr, STAGES: gl.constexpr,
    EARLY: gl.constexpr,
):  # fmt: skip
    # A stage is full when its weights are there and each thread's part of the rows.
    ring = make_ring(gl.float8e4nv if X8 else gl.bfloat16, 1 + 128, ROWS, FEATURES, DEPTH, STAGES)
    table = (ends, buffers, pairs, num_slots)
    rest = (x_scale, w13_scale, h, h_scale, told, num_places)
    if ROWS == 2 * HALF:
        gl.warp_specialize(
            [
                (
                    _multiply,
                    (ring, table, rest, 0, H, I, K, SLOTS, X8, ROWS, FEATURES, STAGES, EARLY),
                ),
                (
                    _multiply,
                    (ring, table, rest, 1, H, I, K, SLOTS, X8, ROWS, FEATURES, STAGES, EARLY),
                ),
                (
                    _fetch,
                    (ring, table, x, w13, H, I, K, SLOTS, ROWS, FEATURES, DEPTH, STAGES, EARLY),
                ),
            ],
            [4, 4],
            [224, 56],  # registers: those that multiply hold two tiles of sums
        )
    else:
        gl.warp_specialize(
            [
                (
                    _multiply,
                    (ring, table, rest, 0, H, I, K, SLOTS, X8, ROWS, FEATURES, STAGES, EARLY),
                ),
                (
                    _fetch,
                    (ring, table, x, w13, H, I, K, SLOTS, ROWS, FEATURES, DEPTH, STAGES, EARLY),
                ),
            ],
            [4],
            [56],
        )


@gluon.jit  # type: ignore[untyped-decorator,unused-ignore]
def _fetch(  # type: ignore[no-untyped-def]
    ring, table, x, w13,
    H: gl.constexpr, I: gl.constexpr, K: gl.constexpr, SLOTS: gl.constexpr,
    ROWS: gl.constexpr, FEATURES: gl.constexpr, DEPTH: gl.constexpr, STAGES: gl.constexpr,
    EARLY: gl.constexpr,
):  # fmt: skip
    xs, _weights, full, empty = ring
    ends, buffers, pairs, num_slots = table
    halves: gl.constexpr = 128 // FEATURES
    num_blocks: gl.constexpr = I // 128
    bits: gl.constexpr = xs.dtype.primitive_bitwidth
    weight_bytes: gl.constexpr = 2 * FEATURES * DEPTH * bits // 8
    quarter: gl.constexpr = ROWS // 4
    wait_for_inputs(EARLY)
    let_next_start(EARLY)  # not before: `down` relies on it (hopper_down.py)
    begin, limit, buffer_S, tiles, until = all_slots(ends, buffers, num_slots, SLOTS, ROWS)
    num_tiles = gl.max(until, 0) * num_blocks * halves
    step = 0
    for work in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        buffer, block, first, end = tile_of(
            work // halves, begin, limit, buffer_S, tiles, until, num_blocks, ROWS
        )
        gate_row = buffer * (2 * I) + block * 128 + work % halves * FEATURES
        # Quarters of a tile that have no rows are left as they are: nobody stores what comes of them.
        at0 = _rows_at(x, pairs, first, end, H, K, quarter, DEPTH)
        at1 = _rows_at(x, pairs, first + quarter, end, H, K, quarter, DEPTH)
        at2 = _rows_at(x, pairs, first + 2 * quarter, end, H, K, quarter, DEPTH)
        at3 = _rows_at(x, pairs, first + 3 * quarter, end, H, K, quarter, DEPTH)
        for k in range(H // DEPTH):
            stage = step % STAGES
            mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
            copy_weights(
                ring, stage, w13, gate_row, gate_row + I, k * DEPTH, weight_bytes, FEATURES, True
            )
            x_tile = xs.index(stage)
            copy_rows(x_tile.slice(0, quarter, 0), at0 + k * DEPTH)
            if first + quarter < end:
                copy_rows(x_tile.slice(quarter, quarter, 0), at1 + k * DEPTH)
            if first + 2 * quarter < end:
                copy_rows(x_tile.slice(2 * quarter, quarter, 0), at2 + k * DEPTH)
            if first + 3 * quarter < end:
                copy_rows(x_tile.slice(3 * quarter, quarter, 0), at3 + k * DEPTH)
            async_copy.mbarrier_arrive(full.index(stage), increment_count=False)
            step += 1


@gluon.jit  # type: ignore[untyped-decorator,unused-ignore]
def _rows_at(  # type: ignore[no-untyped-def]
    x, pairs, first, end, H: gl.constexpr, K: gl.constexpr, ROWS: gl.constexpr, DEPTH: gl.constexpr
):
    """Where the rows of places from `first` on begin; beyond the end it is the last one again."""
    each: gl.constexpr = 128 // x.dtype.element_ty.primitive_bitwidth
    layout: gl.constexpr = gl.BlockedLayout([1, each], [4, 8], [gl.num_warps(), 1], [1, 0])
    place = gl.minimum(first + gl.arange(0, ROWS, gl.SliceLayout(1, layout)), end - 1)
    row = (gl.load(pairs + place) // K).to(gl.int64)
    inside = gl.arange(0, DEPTH, gl.SliceLayout(0, layout))
    return x + (gl.expand_dims(row * H, 1) + gl.expand_dims(inside, 0))


@gluon.jit  # type: ignore[untyped-decorator,unused-ignore]
def _multiply(  # type: ignore[no-untyped-def]
    ring, table, rest, PART: gl.constexpr,
    H: gl.constexpr, I: gl.constexpr, K: gl.constexpr, SLOTS: gl.constexpr, X8: gl.constexpr,
    ROWS: gl.constexpr, FEATURES: gl.constexpr, STAGES: gl.constexpr, EARLY: gl.constexpr,
):  # fmt: skip
    ends, buffers, pairs, num_slots = table
    x_scale, w13_scale, h, h_scale, told, num_places = rest
    halves: gl.constexpr = 128 // FEATURES
    num_blocks: gl.constexpr = I // 128
    turns: gl.constexpr = X8 and ROWS == 2 * HALF and FEATURES == 128
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 32 if X8 else 16])
    wide: gl.constexpr = gl.BlockedLayout([1, 16 if X8 else 8], [8, 4], [4, 1], [1, 0])
    wait_for_inputs(EARLY)
    begin, limit, buffer_S, tiles, until = all_slots(ends, buffers, num_slots, SLOTS, ROWS)
    if turns and PART == 1:
        pass_turn(PART)
    step = 0
    turn = 0
    num_tiles = gl.max(until, 0) * num_blocks * halves
    for work in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        buffer, block, first, end = tile_of(
            work // halves, begin, limit, buffer_S, tiles, until, num_blocks, ROWS
        )
        first += PART * HALF
        if first >= end:  # a last tile that the other group fills
            step = pass_over(ring, step, H // 128 if X8 else H // 64, PART, STAGES, turns)
        else:
            place = first + gl.arange(0, HALF, gl.SliceLayout(1, mma))
            here = place < end
            if X8:
                row = (gl.load(pairs + place, mask=here, other=0) // K).to(gl.int64)
                gate_at = w13_scale + (buffer * (2 * I) // 128 + block) * (H // 128)
                up_at = gate_at + (I // 128) * (H // 128)
                gate, up, step = sums_of_float8(
                    ring, step, gate_at, up_at, x_scale + row * (H // 128), 1, here,
                    PART, H, FEATURES, STAGES, True, turns,
                )  # fmt: skip
                hidden = gate / (1.0 + gl.exp(-gate)) * up
                out, scale = quantize_tile(hidden, told, turn, PART, ROWS, FEATURES)
                scale_at = h_scale + block.to(gl.int64) * num_places + place
                gl.store(scale_at, scale, mask=here & (work % halves == 0))
            else:
                gate, up, step = sums_of_bfloat16(ring, step, PART, H, FEATURES, STAGES, True)
                gate = gate.to(gl.bfloat16).to(gl.float32)
                up = up.to(gl.bfloat16).to(gl.float32)
                out = (gate / (1.0 + gl.exp(-gate)) * up).to(gl.bfloat16)
            place_out = first + gl.arange(0, HALF, gl.SliceLayout(1, wide))
            channel = gl.arange(0, FEATURES, gl.SliceLayout(0, wide))
            channel += block * 128 + work % halves * FEATURES
            h_at = h + (gl.expand_dims(place_out.to(gl.int64) * I, 1) + gl.expand_dims(channel, 0))
            gl.store(h_at, gl.convert_layout(out, wide), mask=gl.expand_dims(place_out < end, 1))
            turn += 1
    if turns and PART == 0:
        take_turn(PART)  # the last one passed
