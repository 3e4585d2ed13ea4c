# ruff: noqa: ANN001, ANN201, ANN202, SIM102  (what Triton compiles has no types, and decides some ifs)
"""The kernels of `cluster.model.cuda.attention`.

Legend: T tokens, N query heads, G KV heads, C channels of a key that are also its value's (MLA), or
all of them, R the others, V channels of a value.
"""

from __future__ import annotations

import triton
import triton.language as tl

from experts.kernels.early import let_next_start, wait_for_inputs
from experts.kernels.product import INTERPRETED, product


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def attend(  # type: ignore[no-untyped-def]
    q, keys, values, out, partial, sums, positions, sequences, tables, num_real,
    num_tokens, num_heads, group, scale, table_stride, key_stride, value_stride,
    BLOCK_SIZE: tl.constexpr, HEADS: tl.constexpr, HEAD_BLOCKS: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr, PART: tl.constexpr, STEP: tl.constexpr,
    C: tl.constexpr, R: tl.constexpr, V: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr,
    LATENT: tl.constexpr, MERGES: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(EARLY)
    let_next_start(EARLY)
    TOKENS: tl.constexpr = ROWS // HEADS
    kv_head, head_block = tl.program_id(1) // HEAD_BLOCKS, tl.program_id(1) % HEAD_BLOCKS
    row = tl.arange(0, ROWS)
    in_group = head_block * HEADS + row % HEADS
    head = kv_head * group + in_group
    c, r, v = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_V)
    key_channels = keys + kv_head.to(tl.int64) * key_stride
    value_channels = values + kv_head.to(tl.int64) * value_stride
    last_token = num_tokens
    if num_real is not None:
        last_token = tl.minimum(tl.load(num_real).to(tl.int32), num_tokens)
    for offset in range(STEP):
        token = tl.program_id(0) * STEP + offset
        position, leads = _leader(token, last_token, positions, sequences, TOKENS)
        if leads:
            sequence = tl.load(sequences + token).to(tl.int64)
            # Tokens of the tile: those that follow in this sequence, up to a multiple of TOKENS.
            tokens = token + row // HEADS
            row_position = position + row // HEADS
            exist = (tokens < num_tokens) & (in_group < group)
            here = exist
            last_key = position
            if TOKENS > 1:
                near = (row // HEADS < TOKENS - position % TOKENS) & (tokens < last_token)
                here &= near & (tl.load(sequences + tokens, mask=exist, other=-1) == sequence)
                last_key = tl.max(tl.where(here, row_position, 0), 0)
            # Offsets inside a tile are small: one wide number, then 32 bits.
            inside = (row // HEADS) * num_heads + head
            at_q = q + token.to(tl.int64) * num_heads * (C + R) + inside[:, None] * (C + R)
            q_c = tl.load(at_q + c[None, :], mask=exist[:, None] & (c < C)[None, :], other=0.0)
            q_r = q_c
            if R > 0:
                r_exist = exist[:, None] & (r < R)[None, :]
                q_r = tl.load(at_q + C + r[None, :], mask=r_exist, other=0.0)
            table = tables + sequence * table_stride
            at_out = out + token.to(tl.int64) * num_heads * V + (inside[:, None] * V + v[None, :])
            out_here = here[:, None] & (v < V)[None, :]
            first_row = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
            first_row *= ROWS
            at_sums = sums + first_row * 2 + row * 2
            at_state = partial + first_row * V + (row[:, None] * V + v[None, :])
            for part_first in range(0, last_key + 1, PART):
                peak, total, acc = _walk(
                    q_c, q_r, key_channels, value_channels, table, row_position, part_first,
                    tl.minimum(part_first + PART, last_key + 1), scale,
                    BLOCK_SIZE, ROWS, KEYS, C, R, V, BLOCK_C, BLOCK_R, BLOCK_V, LATENT,
                )  # fmt: skip
                if MERGES:
                    if part_first > 0:
                        tl.debug_barrier()
                        old_peak, old_total = tl.load(at_sums), tl.load(at_sums + 1)
                        peak, keep, add = weights_of(old_peak, peak)
                        total = tl.fma(old_total, keep, total * add)
                        old_acc = tl.load(at_state, out_here, other=0.0)
                        kept = tl.broadcast_to(keep[:, None], acc.shape)
                        acc = tl.fma(old_acc, kept, acc * add[:, None])
                        tl.debug_barrier()
                if part_first + PART > last_key:
                    tl.store(at_out, (acc / total[:, None]).to(out.dtype.element_ty), out_here)
                elif MERGES:
                    tl.store(at_sums, peak)
                    tl.store(at_sums + 1, total)
                    tl.store(at_state, acc, out_here)


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _leader(token, last_token, positions, sequences, TOKENS: tl.constexpr):  # type: ignore[no-untyped-def]
    """A token's position, and whether it is the first of its tile: TOKENS positions of a sequence."""
    exists = token < last_token
    before = exists & (token > 0)
    position = tl.load(positions + token, mask=exists, other=0).to(tl.int32)
    sequence = tl.load(sequences + token, mask=exists, other=0).to(tl.int32)
    previous = tl.load(positions + token - 1, mask=before, other=0).to(tl.int32)
    neighbour = tl.load(sequences + token - 1, mask=before, other=-1).to(tl.int32)
    follows = before & (neighbour == sequence) & (previous // TOKENS == position // TOKENS)
    return position, exists & (not follows)


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _walk(  # type: ignore[no-untyped-def]
    q_c, q_r, keys, values, table, row_position, first, end, scale,
    BLOCK_SIZE: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    C: tl.constexpr, R: tl.constexpr, V: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr, LATENT: tl.constexpr,
):  # fmt: skip
    """Peak, sum and unnormalised values of the keys first..end, in order."""
    c, r, v = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_V)
    peak = tl.full([ROWS], -1e30, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, BLOCK_V], tl.float32)
    slot = slots_of(table, first + tl.arange(0, KEYS), end, BLOCK_SIZE)
    for start in range(first, end, KEYS):
        position = start + tl.arange(0, KEYS)
        here = position < end
        k_rows = keys + slot[:, None] * (C + R)
        c_here = here[:, None] if BLOCK_C == C else here[:, None] & (c < C)[None, :]
        k_c = tl.load(k_rows + c[None, :], mask=c_here, other=0.0)
        scores = product(q_c, k_c, tl.zeros([ROWS, KEYS], tl.float32))
        if R > 0:
            r_here = here[:, None] if BLOCK_R == R else here[:, None] & (r < R)[None, :]
            k_r = tl.load(k_rows + C + r[None, :], mask=r_here, other=0.0)
            scores = product(q_r, k_r, scores)
        scores = tl.where(position[None, :] <= row_position[:, None], scores * scale, -1e30)
        peak, total, shrink, weights = softmax_step(scores, peak, total)
        v_tile = k_c
        if not LATENT:
            v_here = here[:, None] if BLOCK_V == V else here[:, None] & (v < V)[None, :]
            v_tile = tl.load(values + slot[:, None] * V + v[None, :], mask=v_here, other=0.0)
        # Where the next tile lies is known before it is wanted, so its load can start early.
        slot = slots_of(table, position + KEYS, end, BLOCK_SIZE)
        acc = acc * shrink[:, None]
        if INTERPRETED:
            acc = tl.dot(weights.to(v_tile.dtype).to(tl.float32), v_tile.to(tl.float32), acc)
        else:
            acc = tl.dot(weights.to(v_tile.dtype), v_tile, acc)
    return peak, total, acc


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def softmax_step(scores, peak, total):  # type: ignore[no-untyped-def]
    """One more tile of scores: (peak, sum, what the values so far shrink by, weights of the tile)."""
    tile_peak = tl.max(scores, 1)
    new_peak = tl.maximum(peak, tile_peak)
    shrink = tl.exp2(peak - new_peak)
    weights = tl.exp2(scores - new_peak[:, None])
    total = tl.fma(total, shrink, _exact_sum(weights, tl.exp2(tile_peak - new_peak)))
    return new_peak, total, shrink, weights


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _exact_sum(weights, greatest):  # type: ignore[no-untyped-def]
    """The sum of each row's 64 weights, the same in whatever order the tile's threads add.

    Adding and taking away 128 times the greatest's power of two leaves multiples of a 2^-16 of it, of
    which fp32 adds up 64 without rounding. The sum is off by 64 * 2^-17 of the greatest at most.
    """
    power = (greatest.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    far = (power * 128.0)[:, None]
    return tl.sum((weights + far) - far, 1)


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def slots_of(table, position, end, BLOCK_SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Rows of the cache at these positions of a sequence."""
    block = tl.load(table + position // BLOCK_SIZE, mask=position < end, other=0).to(tl.int64)
    return block * BLOCK_SIZE + position % BLOCK_SIZE


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def weights_of(old_peak, peak):  # type: ignore[no-untyped-def]
    """The peak of two parts, and what the older and the newer of them weigh."""
    both = tl.maximum(old_peak, peak)
    return both, tl.exp2(old_peak - both), tl.exp2(peak - both)
