"""Chooses the next tokens of a replica's sequences, by all that their parameters ask for.

    logits --constraint--> --rules of the request--> --temperature, top-k, top-p, min-p--> token
       |--> log probabilities, as the model gave them

A token depends on its own logits, the request's parameters and the tokens before it only.
"""

from collections.abc import Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property, partial
from pathlib import Path
from time import monotonic
from typing import Any, Final, NamedTuple

from torch import Tensor

from cluster.engine.constraint import Constraint
from cluster.engine.draw import EXCLUDED, FAILED, Rule, Weights, draw
from cluster.engine.guided import Guide, GuideCompiler, check_support
from cluster.engine.logit_rules import LogitRules, has_rules
from cluster.engine.logprobs import prompt_logprobs, token_logprobs
from cluster.engine.sequence import Sequence as EngineSequence
from cluster.engine.sequence import TokenLogprob

__all__ = ["FAILED", "Sampled", "Sampler", "prompt_logprobs"]

COMPILE_TIMEOUT_S: Final = 60.0
_NOTHING_LEFT = (
    "no token is left: the request's constraint, allowed_token_ids and bad_words exclude each other, "
    "or its constraint takes too long to follow"
)


class Sampled(NamedTuple):
    token_id: int
    """FAILED when it is undefined; `error` says why, if it is the request's own doing."""
    logprob: TokenLogprob | None = None
    error: str | None = None


class Sampler:
    """tokenizer_dir: where the checkpoint's tokenizer.json is, for constraints; None refuses them."""

    def __init__(
        self, vocab_size: int, eos_token_ids: Collection[int], tokenizer_dir: Path | None = None
    ) -> None:
        self._vocab_size = vocab_size
        self._eos_token_ids = tuple(eos_token_ids)
        self._tokenizer_dir = tokenizer_dir
        self._thread = ThreadPoolExecutor(1, "compile constraints")

    def add(self, sequence: EngineSequence) -> None:
        """Begin what the sequence needs before its first token; ValueError refuses it alone."""
        constraint = sequence.params.constraint
        if constraint is not None:
            check_support(self._tokenizer_dir, self._eos_token_ids)
            sequence.sampler_state = _Pending(
                self._thread.submit(self._compile, constraint), monotonic() + COMPILE_TIMEOUT_S
            )

    def is_ready(self, sequence: EngineSequence) -> bool:
        """Whether the scheduler may have it: its constraint is compiled. ValueError refuses it."""
        pending = sequence.sampler_state
        if not isinstance(pending, _Pending):
            return True
        if not pending.compiled.done():
            if monotonic() > pending.deadline:
                raise ValueError(f"the constraint was not compiled within {COMPILE_TIMEOUT_S:g} s")
            return False
        if error := pending.compiled.exception():
            raise ValueError(str(error))
        sequence.sampler_state = self._compiler.guide(pending.compiled.result())
        return True

    def sample(self, logits_NV: Tensor, rows: Sequence[EngineSequence]) -> list[Sampled]:
        """One token for each row; `token_ids` of a row are all tokens before it, and no more.

        A sequence may come back after preemption, or elsewhere after a loss: what is kept of it here
        is rebuilt from its tokens. Nothing need be said when a sequence ends.
        """
        rules = [_rule(row) for row in rows]
        tokens = draw(logits_NV, [row.params for row in rows], [r.num_tokens for r in rows], rules)
        sampled = [
            Sampled(token) if token != EXCLUDED else Sampled(FAILED, error=_NOTHING_LEFT)
            for token in tokens
        ]
        asked = [
            i for i, row in enumerate(rows) if row.params.logprobs is not None and tokens[i] >= 0
        ]
        if asked:
            k = [rows[i].params.logprobs or 0 for i in asked]
            found = token_logprobs(logits_NV[asked], [tokens[i] for i in asked], k)
            for i, logprob in zip(asked, found, strict=True):
                sampled[i] = Sampled(tokens[i], logprob)
        return sampled

    def _compile(self, constraint: Constraint) -> Any:
        return self._compiler.compile(constraint)

    @cached_property
    def _compiler(self) -> GuideCompiler:
        """Made in the thread, by the first request that needs it: it takes seconds."""
        return GuideCompiler(self._tokenizer_dir, self._vocab_size, self._eos_token_ids)


class _Pending(NamedTuple):
    """A constraint that is being compiled."""

    compiled: "Future[Any]"
    deadline: float


class _RowRules:
    """All that changes the logits of one sequence; made again, it is the same."""

    def __init__(self, row: EngineSequence, guide: Guide | None) -> None:
        self._num_prompt = row.num_prompt_tokens
        self._guide = guide
        self._rules: LogitRules | None = None
        if has_rules(row.params):
            self._rules = LogitRules(row.params, row.num_prompt_tokens, row.stop_token_ids)

    @property
    def any(self) -> bool:
        return self._guide is not None or self._rules is not None

    def apply(self, logits_V: Weights, token_ids: Sequence[int]) -> None:
        if self._guide is not None:
            self._guide.apply(logits_V, token_ids[self._num_prompt :])
        if self._rules is not None:
            self._rules.apply(logits_V, token_ids)


def _rule(row: EngineSequence) -> Rule | None:
    state = row.sampler_state
    if not isinstance(state, _RowRules):  # not before: the scheduler completes its stop tokens
        assert row.params.constraint is None or isinstance(state, Guide), "is_ready was not asked"
        state = row.sampler_state = _RowRules(row, state)
    return partial(state.apply, token_ids=row.token_ids) if state.any else None
