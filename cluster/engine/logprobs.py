"""How likely the model finds its tokens: natural logarithms of probabilities, ranks, and the likeliest.

Of the logits as the model gave them, before rules, temperature and filters. Each row is reduced on
its own, in fp64 from fp32 exponentials: other rows cannot change a bit of it.

N rows, V vocabulary.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from cluster.engine.sequence import TokenLogprob

_TILE_BYTES = 1 << 21
"""Rows are taken by so much, which stays in a core's cache."""


def token_logprobs(
    logits_NV: Tensor, token_ids: Sequence[int], k: Sequence[int]
) -> list[TokenLogprob]:
    """Of one token of each row, with the k[row] likeliest of the row (all there are, if fewer)."""
    tile = max(1, _TILE_BYTES // (8 * logits_NV.shape[1]))
    found: list[TokenLogprob] = []
    for start in range(0, len(token_ids), tile):
        rows = slice(start, start + tile)
        logits = logits_NV[rows].float().cpu().numpy()
        found += _of_tile(logits, np.array(token_ids[rows], np.int64), list(k[rows]))
    return found


def prompt_logprobs(logits_TV: Tensor, next_ids: Sequence[int], k: int) -> tuple[TokenLogprob, ...]:
    """Of the tokens that follow T tokens of a prompt, with the k likeliest for each."""
    return tuple(token_logprobs(logits_TV, next_ids, [k] * len(next_ids)))


@np.errstate(invalid="ignore")  # NaN and inf give NaN: such a row has no probabilities
def _of_tile(
    logits_NV: NDArray[np.float32], ids_N: NDArray[np.int64], k: list[int]
) -> list[TokenLogprob]:
    highest_N1 = logits_NV.max(axis=1, keepdims=True)
    weights_NV = np.exp(logits_NV - highest_N1).astype(np.float64)
    zeros_N1 = highest_N1.astype(np.float64) + np.log(weights_NV.sum(axis=1, keepdims=True))
    chosen_N1 = np.take_along_axis(logits_NV, ids_N[:, None], axis=1)
    before_NV = logits_NV > chosen_N1
    before_NV |= (logits_NV == chosen_N1) & (np.arange(logits_NV.shape[1]) < ids_N[:, None])
    logprobs, ranks = (chosen_N1 - zeros_N1)[:, 0].tolist(), before_NV.sum(axis=1).tolist()
    found = []
    for row, top_ids in enumerate(_likeliest(logits_NV, k)):
        top_logprobs = logits_NV[row, top_ids] - zeros_N1[row]
        found.append(
            TokenLogprob(
                int(ids_N[row]),
                logprobs[row],
                ranks[row] + 1,
                tuple(top_ids.tolist()),
                tuple(top_logprobs.tolist()),
            )
        )
    return found


def _likeliest(logits_NV: NDArray[np.float32], k: list[int]) -> list[NDArray[np.int64]]:
    """The k[row] ids of the highest logits of each row, in order; of equals the lower id first."""
    vocab_size = logits_NV.shape[1]
    most = min(max(k), vocab_size)
    if not most:
        return [np.empty(0, np.int64)] * len(k)
    cut_N1 = np.partition(logits_NV, vocab_size - most, axis=1)[:, vocab_size - most, None]
    rows, ids = np.nonzero(logits_NV >= cut_N1)
    order = np.lexsort((ids, -logits_NV[rows, ids], rows))
    of_row = np.split(ids[order], np.searchsorted(rows, np.arange(1, len(k))))
    return [ids[:wanted] for ids, wanted in zip(of_row, k, strict=True)]
