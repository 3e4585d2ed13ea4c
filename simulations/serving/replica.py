"""One DP replica: the production scheduler and KV blocks, and what a step of them computes."""

from __future__ import annotations

from typing import NamedTuple

from cluster.engine.plan import StepPlan
from cluster.engine.scheduler import Scheduler, SchedulerConfig
from cluster.engine.sequence import SamplingParams, Sequence, TokenEvent

_ANY_TOKEN = 0  # lengths are what is simulated


class Work(NamedTuple):
    """What one replica computes in one step; see `StepWork` of the cost model."""

    tokens: int = 0
    kv_tokens: int = 0
    pairs: int = 0
    logits: int = 0


IDLE = Work()


class Replica:
    """`plan` a step, then `finish` it; a step that was lost is planned again.

    `idx`, `suspect` (not heard of: its ranks are lost), `in_flight` and `kv_usage` are what admission
    looks at.
    """

    def __init__(self, idx: int, config: SchedulerConfig) -> None:
        self.idx = idx
        self.suspect = False
        self.in_flight = 0
        self.scheduler = Scheduler(config)
        self._preemptions_before = 0
        self._plan = StepPlan()

    @property
    def kv_usage(self) -> float:
        """Share of KV blocks that sequences hold."""
        blocks = self.scheduler.blocks
        return blocks.num_used / blocks.num_blocks

    @property
    def num_preemptions(self) -> int:
        return self._preemptions_before + self.scheduler.num_preemptions

    def add(self, request_id: str, num_tokens: int, max_tokens: int) -> None:
        """Queue a request; ValueError when it can never run here."""
        params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
        self.scheduler.add(Sequence(request_id, [_ANY_TOKEN] * num_tokens, params))

    def plan(self) -> Work:
        """Schedule the next step; if the one before was not finished, it was lost."""
        self.scheduler.take_back(self._plan)
        self._plan = self.scheduler.schedule()
        return work_of(self._plan)

    def finish(self) -> list[TokenEvent]:
        """The planned step was computed."""
        self._plan, plan = StepPlan(), self._plan
        return self.scheduler.update(plan, dict.fromkeys(plan.seq_ids, _ANY_TOKEN))

    def lose(self) -> None:
        """All that it held is gone; the gateway knows the requests."""
        self._preemptions_before = self.num_preemptions
        self.scheduler = Scheduler(self.scheduler.config)
        self._plan = StepPlan()


def work_of(plan: StepPlan) -> Work:
    """Rows through the linear layers, keys read by decoding sequences, (query, key) pairs, rows of
    logits. A query at position p sees p + 1 keys."""
    tokens = kv_tokens = pairs = logits = 0
    for start, num, wants_logits in zip(plan.starts, plan.counts, plan.logits, strict=True):
        tokens += num
        if num == 1:
            kv_tokens += start + 1
            pairs += start + 1
        else:
            pairs += num * start + num * (num + 1) // 2
        logits += wants_logits
    return Work(tokens, kv_tokens, pairs, logits)
