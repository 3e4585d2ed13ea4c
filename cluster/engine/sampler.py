"""From logits to tokens: a token depends on its logits, its parameters and its position only.

Order and meaning of the filters are those of transformers' generate(): temperature, then top-k,
then top-p over what top-k left, then min-p. (vLLM applies min-p before top-k; the result differs
only when min-p would move the top-p cut.) Ties at the top-k cut are all kept; at the top-p cut the
lower id comes first. The token is the inverse of the cumulative distribution, in order of id, at
one uniform number from Philox(key = seed, counter = position).

Each sampled row is computed on its own, so other rows of the batch cannot change a bit of it.

Shapes: N rows, V vocabulary, C chunks of the vocabulary.
"""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from cluster.engine.philox import uniform
from cluster.engine.sampling_params import SamplingParams
from cluster.engine.sequence import Sequence as EngineSequence
from cluster.engine.sequence import TokenLogprob

FAILED = -1
"""Instead of a token id: the row's logits had NaN, +inf, or nothing above -inf."""
_CHUNK = 512

Weights = NDArray[np.float32]


class Sampled(NamedTuple):
    token_id: int
    """FAILED when it is undefined; `error` says why."""
    logprob: TokenLogprob | None = None
    error: str | None = None


class Sampler:
    """Chooses the next tokens of one replica's sequences, by all that their parameters ask for.

    tokenizer_dir: where the checkpoint's tokenizer.json is, for constraints; None refuses them.
    """

    def __init__(
        self, vocab_size: int, eos_token_ids: Collection[int], tokenizer_dir: Path | None = None
    ) -> None:
        self.vocab_size = vocab_size
        self.eos_token_ids = tuple(eos_token_ids)
        self.tokenizer_dir = tokenizer_dir

    def add(self, sequence: EngineSequence) -> None:
        """Begin what the sequence needs before its first token; ValueError refuses it alone."""

    def is_ready(self, sequence: EngineSequence) -> bool:
        """Whether the scheduler may have it: its constraint is compiled. ValueError refuses it."""
        return True

    def sample(self, logits_NV: Tensor, rows: Sequence[EngineSequence]) -> list[Sampled]:
        """One token for each row; `token_ids` of a row are all tokens before it, and no more.

        A sequence may come back after preemption, or elsewhere after a loss: what the sampler keeps of
        it is rebuilt from its tokens. Nothing need be said when a sequence ends.
        """
        params, positions = [row.params for row in rows], [row.num_tokens for row in rows]
        return [Sampled(token_id) for token_id in sample(logits_NV, params, positions)]


def prompt_logprobs(logits_TV: Tensor, next_ids: Sequence[int], k: int) -> tuple[TokenLogprob, ...]:
    """Of the tokens that follow T tokens of a prompt, with the k likeliest for each."""
    raise NotImplementedError


def sample(
    logits_NV: Tensor, params: Sequence[SamplingParams], positions: Sequence[int]
) -> list[int]:
    """Token ids of N rows, or FAILED for a row without a well-defined token.

    logits_NV: [N, V] float32, any device. positions: absolute position that each new token will
    have in its sequence. Greedy rows take the highest logit, the lowest id on ties. Raises
    ValueError when the lengths differ.
    """
    if not len(logits_NV) == len(params) == len(positions):
        raise ValueError(
            f"{len(logits_NV)} rows of logits, {len(params)} params, {len(positions)} positions"
        )
    if not params:
        return []
    highest_N, tokens_N = logits_NV.max(dim=1)  # NaN wins over everything; first of equals
    tokens: list[int] = tokens_N.tolist()
    highest: list[float] = highest_N.tolist()
    numbers = uniform(np.array([p.seed for p in params], np.uint64), np.array(positions, np.uint64))
    for row, row_params in enumerate(params):
        if not np.isfinite(highest[row]):
            tokens[row] = FAILED
        elif not row_params.is_greedy:
            logits_V = logits_NV[row].float().cpu().numpy()
            weights_V = filtered_weights(logits_V, highest[row], row_params)
            tokens[row] = pick(weights_V, float(numbers[row]))
    return tokens


def filtered_weights(logits_V: Weights, highest: float, params: SamplingParams) -> Weights:
    """Unnormalised probabilities [V], the largest being 1; what the filters drop is 0.

    `highest` is the (finite) maximum of the logits: subtracted before dividing by the temperature,
    so that nothing overflows however small the temperature is.
    """
    scaled_V = np.subtract(logits_V, np.float32(highest))
    if params.temperature != 1.0:
        scaled_V /= np.float32(params.temperature)
    weights_V: Weights = np.exp(scaled_V, out=scaled_V)
    vocab_size = len(weights_V)
    if 0 < params.top_k < vocab_size:
        kth = vocab_size - params.top_k
        # By logits: unequal ones may have equal weights, far below the highest.
        weights_V *= logits_V >= np.partition(logits_V, kth)[kth]
    if params.top_p < 1:
        weights_V *= _nucleus(weights_V, params.top_p)
    if params.min_p > 0:
        weights_V *= weights_V >= np.float32(params.min_p)
    return weights_V


def _nucleus(weights_V: Weights, top_p: float) -> NDArray[np.bool_]:
    """The fewest tokens, from the most probable down, that reach `top_p` of the whole: a mask [V].

    A token that follows top_p of the mass is out, and all tokens under half the mean of the
    remaining 1 - top_p do. Leaving those aside first makes the sort short.
    """
    total = float(weights_V.sum(dtype=np.float64))
    floor = 0.5 * (1 - top_p) * total / len(weights_V)
    ranked = np.sort(weights_V[weights_V > floor])[::-1]
    before = np.cumsum(ranked, dtype=np.float64) - ranked
    num_kept = max(1, int(np.searchsorted(before, top_p * total)))
    cut = ranked[num_kept - 1]
    keep_V: NDArray[np.bool_] = weights_V > cut
    equals = np.flatnonzero(weights_V == cut)
    keep_V[equals[: num_kept - np.count_nonzero(keep_V)]] = True
    return keep_V


def pick(weights_V: Weights, number: float) -> int:
    """The first id whose cumulative weight exceeds `number` of the total: chunk first, then id."""
    sums_C = np.add.reduceat(weights_V, np.arange(0, len(weights_V), _CHUNK), dtype=np.float64)
    ends_C = np.cumsum(sums_C)
    target = number * ends_C[-1]
    chunk = min(int(np.searchsorted(ends_C, target, side="right")), int(sums_C.nonzero()[0][-1]))
    start = chunk * _CHUNK
    inside = weights_V[start : start + _CHUNK]
    ends = np.cumsum(inside, dtype=np.float64)
    offset = int(np.searchsorted(ends, target - (ends_C[chunk] - sums_C[chunk]), side="right"))
    # Rounding may put the target a hair beyond the chunk's sum: the last possible token is meant.
    return start + min(offset, int(inside.nonzero()[0][-1]))
