"""What a request wants done to its logits before a token is chosen: masks, biases and penalties.

In the order of vLLM: only allowed tokens, no bad words, no stop token before min_tokens (unless
nothing else is left), biases, then the penalties: repetition (of prompt and completion), frequency
and presence (of the completion). A masked logit is -inf; a bias is penalised, too.

What is kept of a sequence is a function of its tokens alone and catches up with them, so it costs
what its new tokens cost, and is the same after a preemption as without one.

V vocabulary.
"""

from collections import defaultdict
from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import NDArray

from cluster.engine.sampling_params import SamplingParams

Row = NDArray[np.float32]


def has_rules(params: SamplingParams) -> bool:
    """Whether the logits are not taken as they are."""
    return bool(
        params.allowed_token_ids
        or params.bad_words
        or params.min_tokens
        or params.logit_bias
        or _penalised(params)
    )


def _penalised(params: SamplingParams) -> bool:
    return (
        params.repetition_penalty != 1
        or params.frequency_penalty != 0
        or params.presence_penalty != 0
    )


class LogitRules:
    """The rules of one sequence, whose first `num_prompt` tokens are its prompt."""

    def __init__(
        self, params: SamplingParams, num_prompt: int, stop_token_ids: Collection[int]
    ) -> None:
        self._params = params
        self._num_prompt = num_prompt
        self._stop_ids = np.array(sorted(stop_token_ids), np.int64)
        self._allowed_ids = np.array(params.allowed_token_ids, np.int64)
        self._bias_ids = np.array(list(params.logit_bias), np.int64)
        self._biases = np.array(list(params.logit_bias.values()), np.float32)
        self._bad_ids = np.array([word[0] for word in params.bad_words if len(word) == 1], np.int64)
        self._bad_after = defaultdict(list)
        for word in params.bad_words:
            if len(word) > 1:
                self._bad_after[word[-2]].append(word)
        self._counts = TokenCounts() if _penalised(params) else None

    def apply(self, logits_V: Row, token_ids: Sequence[int]) -> None:
        """Change the logits of the token after `token_ids` (prompt and completion) in place."""
        num_emitted = len(token_ids) - self._num_prompt
        if len(self._allowed_ids):
            kept = logits_V[self._allowed_ids]
            logits_V.fill(-np.inf)
            logits_V[self._allowed_ids] = kept
        logits_V[self._bad_ids] = -np.inf
        if self._bad_after and num_emitted:
            for word in self._bad_after.get(token_ids[-1], ()):
                if len(word) <= num_emitted + 1 and _ends_with(token_ids, word[:-1]):
                    logits_V[word[-1]] = -np.inf
        if num_emitted < self._params.min_tokens:
            self._exclude_stops(logits_V)
        logits_V[self._bias_ids] += self._biases
        if self._counts is not None:
            self._counts.catch_up(token_ids, self._num_prompt)
            self._penalise(logits_V, self._counts)

    def _exclude_stops(self, logits_V: Row) -> None:
        """Unless nothing else is left: a constraint that is met ends the completion in any case."""
        kept = logits_V[self._stop_ids]
        logits_V[self._stop_ids] = -np.inf
        if logits_V.max() == -np.inf:
            logits_V[self._stop_ids] = kept

    def _penalise(self, logits_V: Row, counts: "TokenCounts") -> None:
        params, ids, completion = self._params, counts.ids, counts.in_completion
        logits = logits_V[ids]
        if params.repetition_penalty != 1:
            penalty = np.float32(params.repetition_penalty)
            logits = np.where(logits > 0, logits / penalty, logits * penalty)
        logits -= np.float32(params.frequency_penalty) * completion
        logits -= np.float32(params.presence_penalty) * (completion > 0)
        logits_V[ids] = logits


class TokenCounts:
    """The different tokens of a sequence, and how often its completion has each of them."""

    def __init__(self) -> None:
        self._slot_of: dict[int, int] = {}
        self._num_seen = 0
        self._ids = np.zeros(64, np.int64)
        self._in_completion = np.zeros(64, np.float32)

    @property
    def ids(self) -> NDArray[np.int64]:
        return self._ids[: len(self._slot_of)]

    @property
    def in_completion(self) -> Row:
        return self._in_completion[: len(self._slot_of)]

    def catch_up(self, token_ids: Sequence[int], num_prompt: int) -> None:
        """Count what came since the last time."""
        for position in range(self._num_seen, len(token_ids)):
            token_id = token_ids[position]
            slot = self._slot_of.setdefault(token_id, len(self._slot_of))
            if slot == len(self._ids):
                self._ids = np.concatenate([self._ids, np.zeros_like(self._ids)])
                more = np.zeros_like(self._in_completion)
                self._in_completion = np.concatenate([self._in_completion, more])
            self._ids[slot] = token_id
            if position >= num_prompt:
                self._in_completion[slot] += 1
        self._num_seen = len(token_ids)


def _ends_with(token_ids: Sequence[int], tail: Sequence[int]) -> bool:
    return tuple(token_ids[-len(tail) :]) == tuple(tail)
