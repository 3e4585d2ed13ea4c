"""Chooses the next tokens of a replica's sequences, by all that their parameters ask for.

    logits --rules of the request--> --constraint--> --temperature, top-k, top-p, min-p--> token
       |--> log probabilities, as the model gave them

A token depends on its own logits, the request's parameters and the tokens before it only.
"""

from collections.abc import Collection, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from cluster.engine.draw import EXCLUDED, FAILED, Rule, draw
from cluster.engine.draw import draw as sample
from cluster.engine.logit_rules import LogitRules, has_rules
from cluster.engine.logprobs import prompt_logprobs, token_logprobs
from cluster.engine.sequence import Sequence as EngineSequence
from cluster.engine.sequence import TokenLogprob

__all__ = ["FAILED", "Sampled", "Sampler", "prompt_logprobs", "sample"]


_NOTHING_LEFT = (
    "the request's rules (allowed_token_ids, bad_words, min_tokens, constraint) leave no token"
)


class Sampled(NamedTuple):
    token_id: int
    """FAILED when it is undefined; `error` says why."""
    logprob: TokenLogprob | None = None
    error: str | None = None


class Sampler:
    """tokenizer_dir: where the checkpoint's tokenizer.json is, for constraints; None refuses them."""

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


def _rule(row: EngineSequence) -> Rule | None:
    if row.sampler_state is None:
        if not has_rules(row.params):
            return None
        row.sampler_state = LogitRules(row.params, row.num_prompt_tokens, row.stop_token_ids)
    return partial(row.sampler_state.apply, token_ids=row.token_ids)
