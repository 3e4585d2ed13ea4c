# ruff: noqa: ANN001, ANN201, ANN202  (what Triton compiles has no Python types)
"""The kernel of `experts/kernels/choose.py`: one warp takes one token through all of the gate.

Legend: T tokens, E experts, K experts per token, G groups; _PAD: to the next power of two.
"""

from __future__ import annotations

import triton
import triton.language as tl

from experts.kernels.early import let_next_start, wait_for_inputs
from experts.kernels.prefetch import prefetch

_NOTHING: tl.constexpr = tl.constexpr(-(2**63))
"""Below the key of every expert: what was taken, and places that no expert has."""
_DROPPED: tl.constexpr = tl.constexpr(-2139095041)  # of -inf, see _ordered


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def choose_experts(  # type: ignore[no-untyped-def]
    logits, bias, num_tokens, table, gains,
    ids_out, weights_out, slots_out, range_out, chosen, recent,
    num_rows, PARTS: tl.constexpr,
    E: tl.constexpr, E_PAD: tl.constexpr, G: tl.constexpr, G_PAD: tl.constexpr, KEPT: tl.constexpr,
    K: tl.constexpr, K_PAD: tl.constexpr,
    SIGMOID: tl.constexpr, TOP2: tl.constexpr, RENORMALIZE: tl.constexpr, SCALING: tl.constexpr,
    MARGIN: tl.constexpr, BIAS: tl.constexpr,
    COUNTED: tl.constexpr, SLOTS: tl.constexpr, RANGE: tl.constexpr,
    TALLY: tl.constexpr, MOST: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    group, inside = tl.arange(0, G_PAD), tl.arange(0, E_PAD)
    expert = group[:, None] * (E // G) + inside[None, :]
    exists = (group[:, None] < G) & (inside[None, :] < E // G)
    if SLOTS:
        prefetch(table + tl.minimum(expert, E - 1), EARLY)
    if RANGE:
        prefetch(gains + tl.minimum(expert, E - 1), EARLY)
    if BIAS:
        prefetch(bias + tl.minimum(expert, E - 1), EARLY)
    wait_for_inputs(EARLY)
    let_next_start(EARLY)
    row, place = tl.program_id(0).to(tl.int64), tl.arange(0, K_PAD)
    is_row = row < num_rows
    real = is_row
    if COUNTED:
        real = row < tl.minimum(num_rows, tl.load(num_tokens))
    at = row * K + place
    wanted = place < K
    if real:
        found = _logits(logits + row * E + expert, exists, num_rows * E, PARTS)
        peak, total = 0.0, 1.0
        if not SIGMOID:
            peak = tl.max(tl.max(found, 1), 0)
            total = tl.sum(tl.sum(tl.exp(found - peak), 1), 0)
        score = _score(found, peak, total, SIGMOID)
        if BIAS:
            score += tl.load(bias + expert, mask=exists, other=0.0)
        key = _keys(score, expert, exists)
        if G > 1:
            key = _of_best_groups(key, group, G, KEPT, TOP2, exists, expert)
        left = tl.reshape(key, [G_PAD * E_PAD])
        ids = tl.zeros([K_PAD], tl.int32)
        for k in tl.static_range(K):
            best = tl.max(left, 0)
            ids = tl.where(place == k, _expert_of(best), ids)
            left = tl.where(left == best, _NOTHING, left)
        picked = _logits(logits + row * E + ids, wanted, num_rows * E, PARTS)
        weights = tl.where(wanted, _score(picked, peak, total, SIGMOID), 0.0)
        if RENORMALIZE:
            total_weight = tl.sum(weights, 0) + 1e-20
            weights = tl.div_rn(weights, tl.zeros([K_PAD], tl.float32) + total_weight)
        weights = weights * SCALING
        tl.store(ids_out + at, ids.to(tl.int64), mask=wanted)
        tl.store(weights_out + at, weights, mask=wanted)
        if SLOTS:
            tl.store(slots_out + at, tl.load(table + ids, mask=wanted), mask=wanted)
        if RANGE:
            gain = tl.load(gains + ids, mask=wanted, other=0.0)
            tl.store(range_out + row, _range(weights * gain, place, MARGIN, K, K_PAD))
        if TALLY:
            tl.atomic_add(chosen + ids, tl.full([K_PAD], 1, tl.int64), mask=wanted, sem="relaxed")
            tl.store(recent + at, ids.to(tl.int64), mask=wanted & (at < MOST * K))
    else:
        wanted = wanted & (at < num_rows * K)
        tl.store(ids_out + at, tl.full([K_PAD], -1, tl.int64), mask=wanted)
        tl.store(weights_out + at, tl.zeros([K_PAD], tl.float32), mask=wanted)
        if SLOTS:
            tl.store(slots_out + at, tl.full([K_PAD], -1, tl.int32), mask=wanted)
        if RANGE:
            nothing = tl.zeros([K_PAD], tl.float32)
            tl.store(range_out + row, _range(nothing, place, MARGIN, K, K_PAD), mask=is_row)
        if TALLY:
            unfilled = (place < K) & (at < MOST * K)
            tl.store(recent + at, tl.full([K_PAD], -1, tl.int64), mask=unfilled)


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _logits(at, exists, each, PARTS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Parts that lie `each` numbers apart, added in order; -inf where nothing is."""
    found = tl.load(at, mask=exists, other=float("-inf"))
    for part in tl.static_range(1, PARTS):
        found += tl.load(at + part * each, mask=exists, other=0.0)
    return found


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _score(logit, peak, total, SIGMOID: tl.constexpr):  # type: ignore[no-untyped-def]
    if SIGMOID:
        return tl.div_rn(tl.full(logit.shape, 1.0, tl.float32), 1.0 + tl.exp(-logit))
    return tl.div_rn(tl.exp(logit - peak), tl.zeros(logit.shape, tl.float32) + total)


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _ordered(x):  # type: ignore[no-untyped-def]
    """int32 that compare as fp32 do, NaN above all; both zeros are one."""
    bits = tl.where(x == x, x + 0.0, float("nan")).to(tl.int32, bitcast=True)
    bits = tl.where(x == x, bits, 0x7FC00000)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _keys(score, expert, exists):  # type: ignore[no-untyped-def]
    key = (_ordered(score).to(tl.int64) << 32) | (0x7FFFFFFF - expert).to(tl.int64)
    return tl.where(exists, key, _NOTHING)


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _expert_of(key):  # type: ignore[no-untyped-def]
    return 0x7FFFFFFF - (key & 0x7FFFFFFF).to(tl.int32)


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _value_of(key):  # type: ignore[no-untyped-def]
    """The score in a key."""
    ordered = (key >> 32).to(tl.int32)
    return (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _of_best_groups(  # type: ignore[no-untyped-def]
    key, group, G: tl.constexpr, KEPT: tl.constexpr, TOP2: tl.constexpr, exists, expert
):  # fmt: skip
    """The keys with the score -inf outside of the KEPT best groups, the lower first among equals."""
    best = tl.max(key, 1)
    score = _value_of(best)
    if TOP2:
        others = tl.where(key == best[:, None], _NOTHING, key)
        score += _value_of(tl.max(others, 1))
    rank_key = _keys(score, group, group < G)
    ahead = (rank_key[None, :] > rank_key[:, None]).to(tl.int32)
    kept = tl.sum(ahead, 1) < KEPT
    dropped = tl.full(key.shape, _DROPPED, tl.int64) << 32
    dropped = dropped | (0x7FFFFFFF - expert).to(tl.int64)
    return tl.where(kept[:, None] | ~exists, key, dropped)


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _range(terms, place, MARGIN: tl.constexpr, K: tl.constexpr, K_PAD: tl.constexpr):  # type: ignore[no-untyped-def]
    """margin * sqrt(sum of squares, added in top-k order), within [2^-60, 2^100]; NaN stays NaN."""
    squares = terms * terms
    total = 0.0
    for k in tl.static_range(K):
        total += tl.sum(tl.where(place == k, squares, 0.0), 0)
    root = tl.sqrt_rn(tl.zeros([K_PAD], tl.float32) + total) * MARGIN
    reach = tl.max(tl.minimum(tl.maximum(root, 2.0**-60), 2.0**100), 0)
    return tl.where(total == total, reach, float("nan"))
