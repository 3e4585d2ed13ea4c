# ruff: noqa: ANN001, ANN201, ANN202, E741  (what Triton compiles has no Python types; I: intermediate)
"""The tiles of gate and up in `hopper_ffn`: one group of warps gathers rows and fetches weights, others
multiply (experts/kernels/hopper.py).

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
    copy_rows,
    copy_weights,
    start_after,
    store_rows,
    tile_of,
)
from experts.kernels.hopper_quantize import forget, quantize_tile
from experts.kernels.hopper_sums import pass_over, sums_of_tile
from experts.kernels.hopper_words import count_done


@gluon.jit  # type: ignore[untyped-decorator,unused-ignore]
def fetch_gate_up(  # type: ignore[no-untyped-def]
    ring, slots, pairs, x, x_scale, w13,
    H: gl.constexpr, I: gl.constexpr, K: gl.constexpr,
    ROWS: gl.constexpr, FEATURES: gl.constexpr, DEPTH: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """(next step, this program's first piece of what follows)."""
    xs, scales, _weights, full, empty = ring
    halves: gl.constexpr = 128 // FEATURES
    num_blocks: gl.constexpr = I // 128
    bits: gl.constexpr = xs.dtype.primitive_bitwidth
    weight_bytes: gl.constexpr = 2 * FEATURES * DEPTH * bits // 8
    quarter: gl.constexpr = ROWS // 4
    by_thread: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    num_works = gl.max(slots[4], 0) * (num_blocks * halves)
    step = 0
    for work in range(gl.program_id(0), num_works, gl.num_programs(0)):
        _tile, buffer, block, first, end = tile_of(work // halves, slots, num_blocks, ROWS)
        gate_row = buffer * (2 * I) + block * 128 + work % halves * FEATURES
        # Quarters of a tile that have no rows are left as they are: nobody stores what comes of them.
        at0 = _rows_at(x, pairs, first, end, H, K, quarter, DEPTH)
        at1 = _rows_at(x, pairs, first + quarter, end, H, K, quarter, DEPTH)
        at2 = _rows_at(x, pairs, first + 2 * quarter, end, H, K, quarter, DEPTH)
        at3 = _rows_at(x, pairs, first + 3 * quarter, end, H, K, quarter, DEPTH)
        if bits == 8:
            scale_at = x_scale + _row_of(pairs, first, end, K, ROWS, by_thread) * (H // 128)
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
            if bits == 8:
                copy_rows(scales.index(stage), scale_at + k)
            async_copy.mbarrier_arrive(full.index(stage), increment_count=False)
            step += 1
    return step, start_after(num_works)


@gluon.jit  # type: ignore[untyped-decorator,unused-ignore]
def _rows_at(  # type: ignore[no-untyped-def]
    x, pairs, first, end, H: gl.constexpr, K: gl.constexpr, ROWS: gl.constexpr, DEPTH: gl.constexpr
):
    """Where the rows of places from `first` on begin."""
    each: gl.constexpr = 128 // x.dtype.element_ty.primitive_bitwidth
    layout: gl.constexpr = gl.BlockedLayout([1, each], [4, 8], [gl.num_warps(), 1], [1, 0])
    row = _row_of(pairs, first, end, K, ROWS, gl.SliceLayout(1, layout))
    inside = gl.arange(0, DEPTH, gl.SliceLayout(0, layout))
    return x + (gl.expand_dims(row * H, 1) + gl.expand_dims(inside, 0))


@gluon.jit  # type: ignore[untyped-decorator,unused-ignore]
def _row_of(  # type: ignore[no-untyped-def]
    pairs, first, end, K: gl.constexpr, ROWS: gl.constexpr, layout: gl.constexpr
):
    """Of each place from `first` on; beyond the end it is the last one's again."""
    place = gl.minimum(first + gl.arange(0, ROWS, layout), end - 1)
    return (gl.load(pairs + place) // K).to(gl.int64)


@gluon.jit  # type: ignore[untyped-decorator,unused-ignore]
def multiply_gate_up(  # type: ignore[no-untyped-def]
    ring, slots, up, words, num_places, PART: gl.constexpr,
    H: gl.constexpr, I: gl.constexpr, X8: gl.constexpr,
    ROWS: gl.constexpr, FEATURES: gl.constexpr, STAGES: gl.constexpr, TURNS: gl.constexpr,
):  # fmt: skip
    """(next step, next turn, this program's first piece of what follows)."""
    w13_scale, h, h_scale = up
    halves: gl.constexpr = 128 // FEATURES
    num_blocks: gl.constexpr = I // 128
    steps: gl.constexpr = H // 128 if X8 else H // 64
    of_rows: gl.constexpr = gl.SliceLayout(
        1, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 32])
    )
    step = 0
    turn = 0
    spoken = 0
    num_works = gl.max(slots[4], 0) * (num_blocks * halves)
    for work in range(gl.program_id(0), num_works, gl.num_programs(0)):
        tile, buffer, block, first, end = tile_of(work // halves, slots, num_blocks, ROWS)
        if ROWS == 2 * HALF:
            first += PART * HALF
        if ROWS == HALF and (turn & 1) != PART:
            step += steps
        else:
            if first >= end:  # a last tile that the other group fills
                step = pass_over(ring, step, steps, PART, FEATURES, STAGES, TURNS)
            else:
                gate_at = w13_scale
                up_at = w13_scale
                if X8:
                    gate_at += (buffer * (2 * I) // 128 + block) * (H // 128)
                    up_at = gate_at + (I // 128) * (H // 128)
                gate, up_sums, step = sums_of_tile(
                    ring, step, gate_at, up_at, PART, H, X8, ROWS, FEATURES, STAGES, True, TURNS
                )
                if not X8:
                    gate = gate.to(gl.bfloat16).to(gl.float32)
                    up_sums = up_sums.to(gl.bfloat16).to(gl.float32)
                hidden = gate / (1.0 + gl.exp(-gate)) * up_sums
                channel = block * 128 + work % halves * FEATURES
                if X8:
                    q, scale = quantize_tile(hidden, words, spoken, PART, FEATURES)
                    place = first + gl.arange(0, HALF, of_rows)
                    scale_at = h_scale + block.to(gl.int64) * num_places + place
                    gl.store(scale_at, scale, mask=(place < end) & (work % halves == 0))
                    store_rows(h, q, first, end, channel, I)
                else:
                    store_rows(h, hidden.to(gl.bfloat16), first, end, channel, I)
                spoken += 1
            count_done(words, tile)
        turn += 1
    if X8 and FEATURES < 128:
        forget(words, PART)
    return step, turn, start_after(num_works)
