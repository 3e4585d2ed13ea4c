# ruff: noqa: ANN001, ANN201, ANN202, SIM102  (what Triton compiles has no types, and decides some ifs)
"""Attention of few tokens, spread over the GPU: the arithmetic of `attention_kernels.attend`, divided.

One program of `attend` would take the tiles of a token's keys one after the other. Here `score` gives each
tile of keys a program; then `weigh` gives each few channels of the values one, which walks over the tiles'
scores as `attend` does over its own. No number is added to others in another order. What the step's inputs
say, where keys lie, is read before the kernel ahead has ended: no kernel of a step writes it.

Legend: T tokens, N query heads, C and R channels of a key, V channels of a value.
"""

from __future__ import annotations

import triton
import triton.language as tl

from cluster.model.cuda.attention_kernels import slots_of, softmax_step, weights_of
from experts.kernels.early import let_next_start, wait_for_inputs
from experts.kernels.prefetch import prefetch
from experts.kernels.product import INTERPRETED, product


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def score(  # type: ignore[no-untyped-def]
    q, keys, scores, positions, sequences, tables, num_real,
    num_heads, group, scale, table_stride, key_stride, score_stride,
    BLOCK_SIZE: tl.constexpr, HEADS: tl.constexpr, HEAD_BLOCKS: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr, C: tl.constexpr, R: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """scores [T, N, keys]: of a token's heads and a tile of its keys, times `scale`; -1e30 beyond its last."""
    token, kv_head = tl.program_id(0).to(tl.int64), tl.program_id(1) // HEAD_BLOCKS
    position, sequence, exists = _token(positions, sequences, num_real)
    head, here = _heads(tl.program_id(1), HEADS, HEAD_BLOCKS, ROWS, group)
    c, r, key = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_R), tl.arange(0, KEYS)
    LINES: tl.constexpr = BLOCK_C // 32 if BLOCK_C > 32 else 1  # of 128 bytes: twice those of C
    table = tables + sequence * table_stride
    end = tl.where(exists, position + 1, 0)
    first = tl.program_id(2) * KEYS
    slot = slots_of(table, first + key, end, BLOCK_SIZE)
    keys += kv_head.to(tl.int64) * key_stride
    line = tl.arange(0, LINES)[None, :] * 64
    prefetch(keys + slot[:, None] * (C + R) + tl.minimum(line, C + R - 1), EARLY)
    wait_for_inputs(EARLY)
    let_next_start(EARLY)
    at_q = q + (token * num_heads + head[:, None]) * (C + R)
    q_c = tl.load(at_q + c[None, :], mask=here[:, None] & (c < C)[None, :], other=0.0)
    q_r = q_c
    if R > 0:
        q_r = tl.load(at_q + C + r[None, :], mask=here[:, None] & (r < R)[None, :], other=0.0)
    for start in range(first, end, tl.num_programs(2) * KEYS):
        at = start + key
        k_rows = keys + slot[:, None] * (C + R)
        k_here = (at < end)[:, None]
        k_c = tl.load(k_rows + c[None, :], mask=k_here & (c < C)[None, :], other=0.0)
        found = product(q_c, k_c, tl.zeros([ROWS, KEYS], tl.float32))
        if R > 0:
            k_r = tl.load(k_rows + C + r[None, :], mask=k_here & (r < R)[None, :], other=0.0)
            found = product(q_r, k_r, found)
        slot = slots_of(table, at + tl.num_programs(2) * KEYS, end, BLOCK_SIZE)
        found = tl.where(at[None, :] <= position, found * scale, -1e30)
        at_scores = scores + (token * num_heads + head[:, None]) * score_stride + at[None, :]
        tl.store(at_scores, found, mask=here[:, None])


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def weigh(  # type: ignore[no-untyped-def]
    scores, values, out, partial, sums, positions, sequences, tables, num_real,
    num_tokens, num_heads, group, table_stride, value_stride, score_stride,
    BLOCK_SIZE: tl.constexpr, HEADS: tl.constexpr, HEAD_BLOCKS: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr, PART: tl.constexpr, V: tl.constexpr, ROW: tl.constexpr,
    CHANNELS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """A part's softmax, times CHANNELS channels of its values: the output, or a part for `join`.

    ROW: channels from one cached value to the next.
    """
    token, splits = tl.program_id(0).to(tl.int64), tl.cdiv(V, CHANNELS)
    position, sequence, exists = _token(positions, sequences, num_real)
    block, split = tl.program_id(1) // splits, tl.program_id(1) % splits
    head, here = _heads(block, HEADS, HEAD_BLOCKS, ROWS, group)
    v, key = split * CHANNELS + tl.arange(0, CHANNELS), tl.arange(0, KEYS)
    first = tl.program_id(2) * PART
    end = tl.where(exists, tl.minimum(position + 1, first + PART), 0)
    table = tables + sequence * table_stride
    slot = slots_of(table, first + key, end, BLOCK_SIZE)
    wait_for_inputs(EARLY)
    let_next_start(EARLY)
    if first < end:
        values += (block // HEAD_BLOCKS).to(tl.int64) * value_stride
        at_scores = scores + (token * num_heads + head[:, None]) * score_stride
        peak = tl.full([ROWS], -1e30, tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        acc = tl.zeros([ROWS, CHANNELS], tl.float32)
        for start in range(first, end, KEYS):
            at = start + key
            v_here = (at < end)[:, None] & (v < V)[None, :]
            v_tile = tl.load(values + slot[:, None] * ROW + v[None, :], mask=v_here, other=0.0)
            scored = here[:, None] & (at < end)[None, :]
            found = tl.load(at_scores + at[None, :], mask=scored, other=-1e30)
            peak, total, shrink, weights = softmax_step(found, peak, total)
            slot = slots_of(table, at + KEYS, end, BLOCK_SIZE)
            acc = acc * shrink[:, None]
            if INTERPRETED:
                acc = tl.dot(weights.to(v_tile.dtype).to(tl.float32), v_tile.to(tl.float32), acc)
            else:
                acc = tl.dot(weights.to(v_tile.dtype), v_tile, acc)
        stored = here[:, None] & (v < V)[None, :]
        if position < PART:
            at_out = out + (token * num_heads + head[:, None]) * V + v[None, :]
            tl.store(at_out, (acc / total[:, None]).to(out.dtype.element_ty), mask=stored)
        else:
            row = (tl.program_id(2).to(tl.int64) * num_tokens + token) * num_heads + head
            if split == 0:
                tl.store(sums + row * 2, peak, mask=here)
                tl.store(sums + row * 2 + 1, total, mask=here)
            tl.store(partial + row[:, None] * V + v[None, :], acc, mask=stored)


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def join(  # type: ignore[no-untyped-def]
    partial, sums, out, positions, num_real, num_heads,
    PART: tl.constexpr, V: tl.constexpr, BLOCK_V: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Merge a token's parts in order, as `attend` does; a single part is there already."""
    wait_for_inputs(EARLY)
    let_next_start(EARLY)
    token = tl.program_id(0)
    if num_real is not None:
        if token >= tl.load(num_real):
            return
    parts = tl.load(positions + token).to(tl.int32) // PART + 1
    if parts == 1:
        return
    v = tl.arange(0, BLOCK_V)
    row = token.to(tl.int64) * num_heads + tl.program_id(1)
    each = tl.num_programs(0).to(tl.int64) * num_heads  # rows of a part
    peak, total = tl.load(sums + row * 2), tl.load(sums + row * 2 + 1)
    acc = tl.load(partial + row * V + v, mask=v < V, other=0.0)
    for part in range(1, parts):
        at = row + part * each
        peak, keep, add = weights_of(peak, tl.load(sums + at * 2))
        total = tl.fma(total, keep, tl.load(sums + at * 2 + 1) * add)
        new_acc = tl.load(partial + at * V + v, mask=v < V, other=0.0)
        acc = tl.fma(acc, tl.broadcast_to(keep, acc.shape), new_acc * add)
    tl.store(out + row * V + v, (acc / total).to(out.dtype.element_ty), mask=v < V)


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _token(positions, sequences, num_real):  # type: ignore[no-untyped-def]
    """(position, sequence, whether it is a token) of this program's row: reads that wait for no other."""
    token = tl.program_id(0)
    position = tl.load(positions + token).to(tl.int32)
    sequence = tl.load(sequences + token).to(tl.int64)
    exists = token >= 0
    if num_real is not None:
        exists = token < tl.load(num_real)
    return position, sequence, exists


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _heads(block, HEADS: tl.constexpr, HEAD_BLOCKS: tl.constexpr, ROWS: tl.constexpr, group):  # type: ignore[no-untyped-def]
    """The query heads of a program's rows, and which rows have one."""
    row = tl.arange(0, ROWS)
    in_group = block % HEAD_BLOCKS * HEADS + row
    return block // HEAD_BLOCKS * group + in_group, (row < HEADS) & (in_group < group)
