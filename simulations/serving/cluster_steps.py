"""How long a step of the whole cluster takes: its work, its experts' tokens, and the cost model.

L expert layers, S slots of all ranks, R ranks, D replicas.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from simulations.cost import CostModel, StepWork
from simulations.serving.experts import ServedExperts
from simulations.serving.record import Event
from simulations.serving.replica import Work
from simulations.serving.simulation import Step


class ClusterSteps:
    """The `Stepper` of a simulated deployment."""

    def __init__(self, cost: CostModel, experts: ServedExperts) -> None:
        self._cost = cost
        self._experts = experts
        self._num_ranks = cost.deployment.num_ranks

    @property
    def events(self) -> list[Event]:
        return self._experts.events

    def step(self, now_s: float, work: Sequence[Work]) -> Step:
        pause_s = self._experts.advance(now_s)
        work_D4 = np.array(work, dtype=np.float64)
        tokens_D, kv_tokens_D, pairs_D, logits_D = work_D4.T
        slot_LS = self._experts.slot_tokens(int(tokens_D.sum()))
        times = self._cost.step(
            StepWork(
                tokens_BD=tokens_D,
                kv_tokens_BD=kv_tokens_D,
                pairs_BD=pairs_D,
                logits_BD=logits_D,
                has_prompts=bool((pairs_D > kv_tokens_D).any()),
            ),
            slot_LS[None],
        )
        rank_LR = slot_LS.reshape(len(slot_LS), self._num_ranks, -1).sum(axis=-1)
        balancedness = float((rank_LR.mean(axis=1) / rank_LR.max(axis=1)).mean())
        seconds = float(times.total_B[0]) * (1 + self._experts.slowdown) + pause_s
        return Step(seconds, balancedness)

    def set_lost(self, ranks: Iterable[int]) -> bool:
        return self._experts.set_lost(ranks)
