# ruff: noqa: ANN001, ANN201, ANN202, E741  (what Triton compiles has no Python types; I: intermediate)
"""The first half of every expert in one kernel: gate and up products, SwiGLU, quantisation.

A program computes `features` channels of gate and the same of up for some rows of one slot, so that
their product never leaves it. Rows are gathered where they are: nothing is permuted in memory.

FP8: each 128 in-features are summed by the tensor cores and added to fp32 with their scales, since
those sum with 14 bits (arXiv:2412.19437, section 3.3.2). Everything walks along the in-features in
the same steps whatever the tile, so a row's bits do not depend on its company.

Legend: R rows, P places, H hidden, I intermediate, B blocks of 128.
"""

from __future__ import annotations

import triton
import triton.language as tl

from experts.kernels.dequantise import bfloat16_of
from experts.kernels.early import let_next_start, wait_for_inputs
from experts.kernels.product import product
from experts.kernels.tiles import all_slots, tile_of


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def gate_up(  # type: ignore[no-untyped-def]
    x, x_scale, w13, w13_scale, buffers, ends, pairs, h, h_scale,
    num_places, num_slots,
    H: tl.constexpr, I: tl.constexpr, K: tl.constexpr, SLOTS: tl.constexpr,
    X8: tl.constexpr, W8: tl.constexpr,
    ROWS: tl.constexpr, FEATURES: tl.constexpr, DEPTH: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    num_blocks: tl.constexpr = I // FEATURES
    wait_for_inputs(EARLY)
    let_next_start(EARLY)
    begins, limits, reads, tiles, until = all_slots(ends, buffers, num_slots, SLOTS, ROWS)
    for work in range(tl.program_id(0), tl.max(until, 0) * num_blocks, tl.num_programs(0)):
        buffer, block, first, end = tile_of(
            work, begins, limits, reads, tiles, until, num_blocks, ROWS
        )
        _rows(
            x, x_scale, w13, w13_scale, pairs, h, h_scale, num_places,
            buffer, block, first, end, H, I, K, X8, W8, ROWS, FEATURES, DEPTH,
        )  # fmt: skip


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _rows(  # type: ignore[no-untyped-def]
    x, x_scale, w13, w13_scale, pairs, h, h_scale, num_places, buffer, block, first, end,
    H: tl.constexpr, I: tl.constexpr, K: tl.constexpr, X8: tl.constexpr, W8: tl.constexpr,
    ROWS: tl.constexpr, FEATURES: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """One tile: ROWS places from `first` on, before `end`, and one block of channels."""
    place = first + tl.arange(0, ROWS)
    here = place < end
    row = (tl.load(pairs + place, mask=here, other=0) // K).to(tl.int64)
    inside = tl.arange(0, DEPTH)
    x_at = x + row[:, None] * H + inside[None, :]
    gate_row = buffer * (2 * I) + block * FEATURES
    up_row = gate_row + I
    gate = tl.zeros([ROWS, FEATURES], tl.float32)
    up = tl.zeros([ROWS, FEATURES], tl.float32)
    if W8:
        # A scale of the next step is read one step early: it would be waited for otherwise.
        nothing = tl.zeros([ROWS, FEATURES], tl.float32)
        blocks_in: tl.constexpr = H // 128
        gate_scale_at = w13_scale + (gate_row // 128) * blocks_in
        up_scale_at = w13_scale + (up_row // 128) * blocks_in
        gate_scale = tl.load(gate_scale_at)
        up_scale = tl.load(up_scale_at)
        if X8:
            row_scale_at = x_scale + row * blocks_in
            row_scale = tl.load(row_scale_at, mask=here, other=0.0)
        for k in range(blocks_in):
            w_gate = w13.load([gate_row, k * DEPTH])
            w_up = w13.load([up_row, k * DEPTH])
            x_tile = tl.load(x_at + k * DEPTH, mask=here[:, None], other=0.0)
            ahead = tl.minimum(k + 1, blocks_in - 1)
            next_gate_scale = tl.load(gate_scale_at + ahead)
            next_up_scale = tl.load(up_scale_at + ahead)
            if X8:
                next_row_scale = tl.load(row_scale_at + ahead, mask=here, other=0.0)
                gate += product(x_tile, w_gate, nothing) * (row_scale * gate_scale)[:, None]
                up += product(x_tile, w_up, nothing) * (row_scale * up_scale)[:, None]
                row_scale = next_row_scale
            else:
                gate += product(x_tile, bfloat16_of(w_gate), nothing) * gate_scale
                up += product(x_tile, bfloat16_of(w_up), nothing) * up_scale
            gate_scale = next_gate_scale
            up_scale = next_up_scale
    else:
        for k in range(H // DEPTH):
            x_tile = tl.load(x_at + k * DEPTH, mask=here[:, None], other=0.0)
            gate = product(x_tile, w13.load([gate_row, k * DEPTH]), gate)
            up = product(x_tile, w13.load([up_row, k * DEPTH]), up)
    channel = block * FEATURES + tl.arange(0, FEATURES)
    h_at = h + place.to(tl.int64)[:, None] * I + channel[None, :]
    if X8:
        hidden = gate / (1.0 + tl.exp(-gate)) * up
        amax = tl.max(tl.abs(hidden), 1)
        scale = tl.div_rn(tl.maximum(amax, 1e-4), 448.0)
        q = tl.div_rn(hidden, scale[:, None]).to(tl.float8e4nv)
        tl.store(h_at, q, mask=here[:, None])
        # Transposed: a program of the second product reads the scales of many places at once.
        tl.store(h_scale + block.to(tl.int64) * num_places + place, scale, mask=here)
    else:
        # Rounded where the layer on a CPU rounds (experts/activation.py).
        gate = gate.to(tl.bfloat16).to(tl.float32)
        up = up.to(tl.bfloat16).to(tl.float32)
        hidden = gate / (1.0 + tl.exp(-gate)) * up
        tl.store(h_at, hidden.to(tl.bfloat16), mask=here[:, None])
