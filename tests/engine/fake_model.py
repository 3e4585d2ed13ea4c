"""A model whose next token is a hash of all tokens before it, read from a simulated paged cache.

Each position's "key" is written to its KV slot by the plan that computes it, and the next token is
a hash of what the block table finds there: a wrong start, block table, chunk or a block shared by
two sequences changes the tokens.
"""

import zlib
from collections.abc import Sequence as TokenIds

from cluster.engine.plan import PlanItem, StepPlan
from cluster.engine.scheduler import Scheduler
from cluster.engine.sequence import TokenEvent

VOCAB_SIZE = 50


def next_token(prefix: TokenIds[int]) -> int:
    return zlib.crc32(repr(list(prefix)).encode()) % VOCAB_SIZE


def run_alone(prompt: TokenIds[int], num_tokens: int, stop: TokenIds[int] = ()) -> list[int]:
    """What the request must give, whatever happens around it: no scheduler involved."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + num_tokens:
        tokens.append(next_token(tokens))
        if tokens[-1] in stop:
            break
    return tokens[len(prompt) :]


class FakeModel:
    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self.cache: list[int | None] = [None] * (num_blocks * block_size)

    def _slot(self, item: PlanItem, position: int) -> int:
        block = item.block_table[position // self.block_size]
        return block * self.block_size + position % self.block_size

    def forward(self, plan: StepPlan) -> dict[int, int]:
        for item in plan.items:
            for offset, token_id in enumerate(item.token_ids):
                self.cache[self._slot(item, item.start + offset)] = token_id
        tokens = {}
        for item in plan.logit_items:
            end = item.start + len(item.token_ids)
            tokens[item.seq_id] = next_token([self.cache[self._slot(item, p)] for p in range(end)])
        return tokens


def step(scheduler: Scheduler, model: FakeModel) -> list[TokenEvent]:
    plan = StepPlan.decode(scheduler.schedule().encode())  # as a follower sees it
    return scheduler.update(plan, model.forward(plan))
