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
    highest_N, tokens_N = logits_NV.max(dim=1)  # NaN wins over everything; first of equals
    tokens = np.where(np.isfinite(highest_N.float().numpy(force=True)), tokens_N.cpu(), FAILED)
    tile = max(1, _TILE_BYTES // (4 * logits_NV.shape[1]))
    ruled = [row for row, rule in enumerate(rules) if rule]
    drawn = [row for row, p in enumerate(params) if not p.is_greedy and not rules[row]]
    for kind in (ruled, drawn):
        for start in range(0, len(kind), tile):
            rows = kind[start : start + tile]
            logits = logits_NV[rows].float().numpy(force=True)
            for row_V, row in zip(logits, rows, strict=True):
                if (rule := rules[row]) is not None:
                    rule(row_V)
            found = _draw_tile(logits, [params[i] for i in rows], [positions[i] for i in rows])
            tokens[rows] = np.where(tokens[rows] == FAILED, FAILED, found)
    return list(map(int, tokens))


@np.errstate(invalid="ignore")
def _draw_tile(
    logits_NV: Weights, params: Sequence[SamplingParams], positions: Sequence[int]
) -> NDArray[np.int64]:
    """The tokens of a few rows, whose logits are overwritten."""
    highest_N = logits_NV.max(axis=1)
    greedy_N = np.array([p.is_greedy for p in params])
    tokens_N = logits_NV.argmax(axis=1)
    if not greedy_N.all():
        filtered_weights(logits_NV, highest_N, params)
        seeds = np.array([p.seed for p in params], np.uint64)
        drawn_N = pick(logits_NV, uniform(seeds, np.array(positions, np.uint64)))
        tokens_N = np.where(greedy_N, tokens_N, drawn_N)
    return np.where(np.isfinite(highest_N), tokens_N, EXCLUDED)


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
            row_V[row_V < np.partition(row_V, kth)[kth]] = -np.inf
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
    vocab_size = weights_NV.shape[1]
    starts_C = np.arange(0, vocab_size, _CHUNK)
    sums_NC = np.add.reduceat(weights_NV, starts_C, axis=1, dtype=np.float64)
    ends_NC = np.cumsum(sums_NC, axis=1)
    targets_N = numbers_N * ends_NC[:, -1]
    chunk_N1 = _first_above(sums_NC, ends_NC, targets_N)[:, None]
    before_N1 = np.take_along_axis(ends_NC - sums_NC, chunk_N1, axis=1)
    ids = chunk_N1 * _CHUNK + np.arange(min(_CHUNK, vocab_size))
    inside = np.take_along_axis(weights_NV, np.minimum(ids, vocab_size - 1), axis=1)
    inside *= ids < vocab_size
    ends = np.cumsum(inside.astype(np.float64), axis=1)
    return chunk_N1[:, 0] * _CHUNK + _first_above(inside, ends, targets_N - before_N1[:, 0])


def _first_above(
    parts: NDArray[np.floating], ends: NDArray[np.float64], targets_N: NDArray[np.float64]
) -> NDArray[np.int64]:
    """Where the running totals `ends` of `parts` first exceed a target, in each row.

    Rounding may put the target a hair beyond the last end: the last part above 0 is meant.
    """
    last_N = parts.shape[1] - 1 - np.argmax(parts[:, ::-1] != 0, axis=1)
    found: NDArray[np.int64] = np.minimum((ends <= targets_N[:, None]).sum(axis=1), last_N)
    return found
