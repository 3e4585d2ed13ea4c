# ruff: noqa: ANN001, ANN201, E741  (what Triton compiles has no Python types; I: intermediate)
"""The tiles of down in `hopper_ffn`; a tile waits until all channels of its rows are there.

Legend: as experts/kernels/down.py.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from experts.kernels.hopper import (
    HALF,
    copy_rows,
    copy_tile,
    copy_weights,
    store_rows,
    tile_of,
)
from experts.kernels.hopper_sums import pass_over, sums_of_tile
from experts.kernels.hopper_words import leave, wait_for_tile


@gluon.jit  # type: ignore[untyped-decorator,unused-ignore]
def fetch_down(  # type: ignore[no-untyped-def]
    ring, slots, h_tiles, h_scale, w2, words, num_places, step, start,
    H: gl.constexpr, I: gl.constexpr,
    ROWS: gl.constexpr, FEATURES: gl.constexpr, DEPTH: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The first tile's weights are asked for before its rows are there."""
    hs, scales, _weights, full, empty = ring
    bits: gl.constexpr = hs.dtype.primitive_bitwidth
    by_thread: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    num_blocks: gl.constexpr = H // (2 * FEATURES)
    steps: gl.constexpr = I // DEPTH
    stages_ahead: gl.constexpr = min(STAGES, steps)
    parts: gl.constexpr = I // FEATURES * (ROWS // HALF)
    stage_bytes: gl.constexpr = (ROWS + 2 * FEATURES) * DEPTH * bits // 8
    num_tiles = gl.max(slots[4], 0)
    for work in range(start, num_tiles * num_blocks, gl.num_programs(0)):
        tile, buffer, block, first, end = tile_of(work, slots, num_blocks, ROWS)
        w_row = buffer * H + block * (2 * FEATURES)
        ahead = gl.where(work == start, stages_ahead, 0)
        for k in range(ahead):
            stage = (step + k) % STAGES
            mbarrier.wait(empty.index(stage), (((step + k) // STAGES) & 1) ^ 1)
            copy_weights(
                ring, stage, w2, w_row, w_row + FEATURES, k * DEPTH, stage_bytes, FEATURES, True
            )
        wait_for_tile(words, tile, parts)
        place = gl.minimum(first + gl.arange(0, ROWS, by_thread), end - 1)
        for k in range(steps):
            stage = step % STAGES
            mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
            copy_weights(
                ring, stage, w2, w_row, w_row + FEATURES, k * DEPTH, stage_bytes, FEATURES,
                k >= ahead,
            )  # fmt: skip
            copy_tile(h_tiles, [first, k * DEPTH], full.index(stage), hs.index(stage))
            if bits == 8:
                block_at = h_scale + gl.to_tensor(k).to(gl.int64) * num_places
                copy_rows(scales.index(stage), block_at + place)
            async_copy.mbarrier_arrive(full.index(stage), increment_count=False)
            step += 1
    leave(words, num_tiles)


@gluon.jit  # type: ignore[untyped-decorator,unused-ignore]
def multiply_down(  # type: ignore[no-untyped-def]
    ring, slots, down, step, turn, start, PART: gl.constexpr,
    H: gl.constexpr, I: gl.constexpr, X8: gl.constexpr,
    ROWS: gl.constexpr, FEATURES: gl.constexpr, STAGES: gl.constexpr, TURNS: gl.constexpr,
):  # fmt: skip
    """The next turn."""
    w2_scale, y = down
    num_blocks: gl.constexpr = H // (2 * FEATURES)
    steps: gl.constexpr = I // 128 if X8 else I // 64
    for work in range(start, gl.max(slots[4], 0) * num_blocks, gl.num_programs(0)):
        _tile, buffer, block, first, end = tile_of(work, slots, num_blocks, ROWS)
        if ROWS == 2 * HALF:
            first += PART * HALF
        if ROWS == HALF and (turn & 1) != PART:
            step += steps
        elif first >= end:  # a last tile that the other group fills
            step = pass_over(ring, step, steps, PART, FEATURES, STAGES, TURNS)
        else:
            feature = block * (2 * FEATURES)
            left_at = w2_scale
            right_at = w2_scale
            if X8:
                left_at += (buffer * H + feature) // 128 * (I // 128)
                right_at = left_at + FEATURES // 128 * (I // 128)
            left, right, step = sums_of_tile(
                ring, step, left_at, right_at, PART, I, X8, ROWS, FEATURES, STAGES, False, TURNS
            )
            store_rows(y, left.to(gl.bfloat16), first, end, feature, H)
            store_rows(y, right.to(gl.bfloat16), first, end, feature + FEATURES, H)
        turn += 1
    return turn
