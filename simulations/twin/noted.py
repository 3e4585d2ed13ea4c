"""Parts of an engine that note what passes through them, each around the part that it stands for.

They go in from outside, before the first step; an engine that is not recorded knows nothing of them.

T tokens of a batch on one rank, K experts per token.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from cluster.engine.mailbox import Frame, LocalMailbox
from cluster.engine.plan import StepPlan
from cluster.engine.scheduler import Scheduler
from cluster.engine.sequence import Sequence as Request
from cluster.engine.sequence import TokenEvent
from comms.fixed import num_escapes
from comms.group import Group, PendingExchange
from comms.where import Where
from experts.slot_choice import SlotChoice
from router.placement import LayerPlacement


class Arrival(NamedTuple):
    """A frame for a leader that comes when it has made so many iterations."""

    iteration: int
    frame: Frame


class TimedMailbox(LocalMailbox):
    """Frames that arrive one after the other; ends as LocalMailbox does."""

    def __init__(self, arrivals: Sequence[Arrival]) -> None:
        super().__init__([arrival.frame for arrival in arrivals])
        self._unread.clear()
        self._coming = sorted(arrivals, key=lambda arrival: arrival.iteration)
        self._iteration = 0

    def receive(self, timeout_s: float) -> list[Frame]:
        while self._coming and self._coming[0].iteration <= self._iteration:
            self.post(self._coming.pop(0).frame)
        self._iteration += 1
        return super().receive(timeout_s)


class NotedScheduler(Scheduler):
    """By iteration: the requests taken in, the plan, encoded, and the tokens (seq_id, token)."""

    def __init__(self, scheduler: Scheduler) -> None:
        super().__init__(scheduler.config)
        self.added: list[tuple[int, str, list[int], dict[str, Any]]] = []
        self.plans: list[bytes] = []
        self.sampled: list[tuple[int, int, int]] = []

    def add(self, sequence: Request) -> None:
        prompt = list(sequence.token_ids)
        super().add(sequence)
        params = sequence.params.to_dict()
        self.added.append((len(self.plans), sequence.request_id, prompt, params))

    def schedule(self) -> StepPlan:
        plan = super().schedule()
        self.plans.append(plan.encode())
        return plan

    def update(self, plan: StepPlan, tokens: Mapping[int, int]) -> list[TokenEvent]:
        iteration = len(self.plans) - 1
        self.sampled += [(iteration, seq_id, token) for seq_id, token in tokens.items()]
        return super().update(plan, tokens)


class NotedChoice:
    """A SlotChoice; `taken` are the (ids_TK, slots_TK) since it was last emptied."""

    def __init__(self, choice: SlotChoice) -> None:
        self._choice = choice
        self.taken: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []

    def choose(self, ids_TK: Tensor, counts_E: Tensor, layer: LayerPlacement) -> Tensor:
        slots_TK = self._choice.choose(ids_TK, counts_E, layer)
        self.taken.append((ids_TK.numpy().copy(), slots_TK.numpy().copy()))
        return slots_TK

    def prepare(self, layer: LayerPlacement) -> None:
        self._choice.prepare(layer)


class NotedRail:
    """A Group; `escapes` counts, by (step, layer, destination), what sums of combine "fixed" could
    not say in 16 bits: the only bytes that depend on what tokens contain."""

    def __init__(self, rail: Group, where: Where) -> None:
        self._rail, self._where = rail, where
        self.escapes: Counter[tuple[int, int, int]] = Counter()

    def start_exchange(self, chunks: Iterable[Sequence[Tensor]], stage: str) -> PendingExchange:
        if stage == "combine/exchange":
            chunks = list(self._noted(chunks))
        return self._rail.start_exchange(chunks, stage)

    def _noted(self, chunks: Iterable[Sequence[Tensor]]) -> Iterator[Sequence[Tensor]]:
        for parts in chunks:
            for peer, part in zip(self._rail.ranks, parts, strict=True):
                if part.numel():
                    self.escapes[self._where.step, self._where.layer, peer] += num_escapes(part)
            yield parts

    def __getattr__(self, name: str) -> Any:
        return getattr(self._rail, name)
