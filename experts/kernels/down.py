# ruff: noqa: ANN001, ANN201, ANN202, E741  (what Triton compiles has no Python types; I: intermediate)
"""The second half of every expert: its down product, for rows that are sorted by slot.

Legend: P places, H hidden, I intermediate, B blocks of 128.
"""

from __future__ import annotations

import triton
import triton.language as tl

from experts.kernels.dequantise import bfloat16_of
from experts.kernels.early import let_next_start, wait_for_inputs
from experts.kernels.product import product
from experts.kernels.tiles import all_slots, tile_of


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def down(  # type: ignore[no-untyped-def]
    h, h_scale, w2, w2_scale, buffers, ends, y,
    num_places, num_slots,
    H: tl.constexpr, I: tl.constexpr, SLOTS: tl.constexpr,
    X8: tl.constexpr, W8: tl.constexpr,
    ROWS: tl.constexpr, FEATURES: tl.constexpr, DEPTH: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    num_blocks: tl.constexpr = H // FEATURES
    wait_for_inputs(EARLY)
    let_next_start(EARLY)
    begins, limits, reads, tiles, until = all_slots(ends, buffers, num_slots, SLOTS, ROWS)
    for work in range(tl.program_id(0), tl.max(until, 0) * num_blocks, tl.num_programs(0)):
        buffer, block, first, end = tile_of(
            work, begins, limits, reads, tiles, until, num_blocks, ROWS
        )
        _rows(
            h, h_scale, w2, w2_scale, y, num_places,
            buffer, block, first, end, H, I, X8, W8, ROWS, FEATURES, DEPTH,
        )  # fmt: skip


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _rows(  # type: ignore[no-untyped-def]
    h, h_scale, w2, w2_scale, y, num_places, buffer, block, first, end,
    H: tl.constexpr, I: tl.constexpr, X8: tl.constexpr, W8: tl.constexpr,
    ROWS: tl.constexpr, FEATURES: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """One tile: ROWS places from `first` on, before `end`, and one block of out-features."""
    place = first + tl.arange(0, ROWS)
    here = place < end
    w_row = buffer * H + block * FEATURES
    acc = tl.zeros([ROWS, FEATURES], tl.float32)
    if W8:
        nothing = tl.zeros([ROWS, FEATURES], tl.float32)
        blocks_in: tl.constexpr = I // 128
        w_scale_at = w2_scale + (w_row // 128) * blocks_in
        w_scale = tl.load(w_scale_at)
        if X8:
            row_scale_at = h_scale + place
            row_scale = tl.load(row_scale_at, mask=here, other=0.0)
        for k in range(blocks_in):
            h_tile = h.load([first, k * DEPTH])
            w_tile = w2.load([w_row, k * DEPTH])
            ahead = tl.minimum(k + 1, blocks_in - 1)
            next_w_scale = tl.load(w_scale_at + ahead)
            if X8:
                next_row_scale = tl.load(
                    row_scale_at + ahead.to(tl.int64) * num_places, mask=here, other=0.0
                )
                acc += product(h_tile, w_tile, nothing) * (row_scale * w_scale)[:, None]
                row_scale = next_row_scale
            else:
                acc += product(h_tile, bfloat16_of(w_tile), nothing) * w_scale
            w_scale = next_w_scale
    else:
        for k in range(I // DEPTH):
            acc = product(h.load([first, k * DEPTH]), w2.load([w_row, k * DEPTH]), acc)
    feature = block * FEATURES + tl.arange(0, FEATURES)
    y_at = y + place.to(tl.int64)[:, None] * H + feature[None, :]
    tl.store(y_at, acc.to(tl.bfloat16), mask=here[:, None])
