"""From logits to tokens: a token depends on its logits, its parameters and its position only.

Order and meaning of the filters are those of transformers' generate(): temperature, then top-k,
then top-p over what top-k left, then min-p. (vLLM applies min-p before top-k; the result differs
only when min-p would move the top-p cut.) Ties at the top-k cut are all kept; at the top-p cut the
lower id comes first. The token is the inverse of the cumulative distribution, in order of id, at
one uniform number from Philox(key = seed, counter = position).

Rows are computed together, but each by element or by itself along the vocabulary, so other rows of
the batch cannot change a bit of it.

Shapes: N rows, V vocabulary, C chunks of the vocabulary.
"""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from cluster.engine.philox import uniform
from cluster.engine.sampling_params import SamplingParams

FAILED = -1
"""Instead of a token id: the row's logits had NaN, +inf, or nothing above -inf."""
EXCLUDED = -2
"""Instead of a token id: the row's rules left nothing above -inf."""
_CHUNK = 512
_TILE_BYTES = 1 << 20
"""Rows are taken by so much, which stays in a core's cache."""

Weights = NDArray[np.float32]
Rule = Callable[[Weights], None]
"""Changes the logits of its row [V] in place."""


def draw(
    logits_NV: Tensor,
    params: Sequence[SamplingParams],
    positions: Sequence[int],
    rules: Sequence[Rule | None] = (),
) -> list[int]:
    """Token ids of N rows, or FAILED or EXCLUDED for a row without a well-defined token.

    logits_NV: [N, V] float32, any device; not changed. positions: absolute position that each new
    token will have in its sequence. Greedy rows take the highest logit, the lowest id on ties.
    `rules` (none, or one for each row) come first. Raises ValueError when the lengths differ.
    """
    if not len(logits_NV) == len(params) == len(positions):
        raise ValueError(
            f"{len(logits_NV)} rows of logits, {len(params)} params, {len(positions)} positions"
        )
    if not params:
        return []
    rules = rules or [None] * len(params)
    tokens_N = np.empty(len(params), np.int64)
    likeliest = [row for row, p in enumerate(params) if p.is_greedy and not rules[row]]
    if likeliest:
        picked_NV = logits_NV if len(likeliest) == len(params) else logits_NV[likeliest]
        highest_N, ids_N = picked_NV.max(dim=1)  # NaN wins over everything; first of equals
        finite_N = highest_N.isfinite()
        tokens_N[likeliest] = ids_N.where(finite_N, FAILED).numpy(force=True)
    seeds_N, positions_N = np.array([p.seed for p in params], np.uint64), np.array(positions)
    numbers_N = uniform(seeds_N, positions_N.astype(np.uint64))
    ruled = [row for row, rule in enumerate(rules) if rule]
    drawn = [row for row, p in enumerate(params) if not p.is_greedy and not rules[row]]
    tile = max(1, _TILE_BYTES // (4 * logits_NV.shape[1]))
    for kind in (ruled, drawn):
        for start in range(0, len(kind), tile):
            rows = kind[start : start + tile]
            logits = logits_NV[rows].float().numpy(force=True)
            of_rows = [params[row] for row in rows], [rules[row] for row in rows]
            tokens_N[rows] = _draw_tile(logits, numbers_N[rows], *of_rows)
    result: list[int] = tokens_N.tolist()
    return result


@np.errstate(invalid="ignore")
def _draw_tile(
    logits_NV: Weights,
    numbers_N: NDArray[np.float64],
    params: Sequence[SamplingParams],
    rules: Sequence[Rule | None],
) -> NDArray[np.int64]:
    """The tokens of a few rows, whose logits are overwritten."""
    highest_N = logits_NV.max(axis=1)
    failed_N = ~np.isfinite(highest_N)
    if any(rules):
        for row_V, rule in zip(logits_NV, rules, strict=True):
            if rule is not None:
                rule(row_V)
        highest_N = logits_NV.max(axis=1)
    excluded_N = ~np.isfinite(highest_N)
    logits_NV[excluded_N], highest_N[excluded_N] = 0, 0
    greedy_N = np.array([p.is_greedy for p in params])
    tokens_N = logits_NV.argmax(axis=1) if greedy_N.any() else np.zeros(len(params), np.int64)
    if not greedy_N.all():
        filtered_weights(logits_NV, highest_N, params)
        tokens_N = np.where(greedy_N, tokens_N, pick(logits_NV, numbers_N))
    tokens_N[excluded_N] = EXCLUDED
    tokens_N[failed_N] = FAILED
    return tokens_N


def filtered_weights(
    logits_NV: Weights, highest_N: Weights, params: Sequence[SamplingParams]
) -> None:
    """Logits to unnormalised probabilities in place, the largest being 1; the filters leave 0.

    `highest_N` are the (finite) maxima of the rows: subtracted before dividing by the temperature,
    so that nothing overflows however small the temperature is. Of greedy rows nothing is said.
    """
    vocab_size = logits_NV.shape[1]
    for row_V, p in zip(logits_NV, params, strict=True):
        if 0 < p.top_k < vocab_size:
            # By logits: unequal ones may have equal weights, far below the highest.
            kth = vocab_size - p.top_k
            np.putmask(row_V, row_V < np.partition(row_V, kth)[kth], -np.inf)
    logits_NV -= highest_N[:, None]
    temperatures_N = np.array([1.0 if p.is_greedy else p.temperature for p in params], np.float32)
    if (temperatures_N != 1).any():
        logits_NV /= temperatures_N[:, None]
    weights_NV = np.exp(logits_NV, out=logits_NV)
    for row_V, p in zip(weights_NV, params, strict=True):
        if p.top_p < 1 and not p.is_greedy:
            _cut_nucleus(row_V, p.top_p)
        if p.min_p > 0:
            row_V *= row_V >= np.float32(p.min_p)


def _cut_nucleus(weights_V: Weights, top_p: float) -> None:
    """Keep the fewest tokens, from the most probable down, that reach `top_p` of the whole.

    A token that follows top_p of the mass is out, and all tokens under half the mean of the
    remaining 1 - top_p do. Leaving those aside first makes the sort short.
    """
    total = float(weights_V.sum(dtype=np.float64))
    floor = 0.5 * (1 - top_p) * total / len(weights_V)
    ids = np.flatnonzero(weights_V > floor)
    candidates = weights_V[ids]
    ranked = np.sort(candidates)[::-1].astype(np.float64)
    before = np.cumsum(ranked) - ranked
    num_kept = max(1, int(np.searchsorted(before, top_p * total)))
    cut = np.float32(ranked[num_kept - 1])
    keep = candidates > cut
    equals = np.flatnonzero(candidates == cut)
    keep[equals[: num_kept - np.count_nonzero(keep)]] = True
    weights_V.fill(0)
    weights_V[ids[keep]] = candidates[keep]


def pick(weights_NV: Weights, numbers_N: NDArray[np.float64]) -> NDArray[np.int64]:
    """The first ids whose cumulative weight exceeds `numbers` of the total: chunk first, then id."""
    num_rows, vocab_size = weights_NV.shape
    starts_C = np.arange(0, vocab_size, _CHUNK)
    sums_NC = np.add.reduceat(weights_NV, starts_C, axis=1, dtype=np.float64)
    ends_NC = np.cumsum(sums_NC, axis=1)
    targets_N = numbers_N * ends_NC[:, -1]
    chunks_N = _first_above(sums_NC, ends_NC, targets_N)
    rows_N = np.arange(num_rows)
    targets_N -= ends_NC[rows_N, chunks_N] - sums_NC[rows_N, chunks_N]
    inside = np.zeros((num_rows, _CHUNK))
    for row, start in enumerate(starts_C[chunks_N].tolist()):
        part = weights_NV[row, start : start + _CHUNK]
        inside[row, : len(part)] = part
    return starts_C[chunks_N] + _first_above(inside, np.cumsum(inside, axis=1), targets_N)


def _first_above(
    parts: NDArray[np.float64], ends: NDArray[np.float64], targets_N: NDArray[np.float64]
) -> NDArray[np.int64]:
    """Where the running totals `ends` of `parts` first exceed a target, in each row."""
    found_N: NDArray[np.int64] = (ends <= targets_N[:, None]).sum(axis=1)
    # Rounding may put the target a hair beyond the last end: the last part above 0 is meant.
    for row in np.flatnonzero(found_N == parts.shape[1]):
        found_N[row] = np.flatnonzero(parts[row])[-1]
    return found_N
