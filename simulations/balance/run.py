"""One expert-parallel group through a workload, under several policies side by side.

All policies see the same batches. Steps go in blocks, from one look at the load to the next, and end
early where a layer changes. A policy has its own clock: the time its steps take decides when experts
that are under way arrive.

B steps, O origins, L layers, E experts, S slots of all ranks, R ranks, N nodes, T steps of the run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from router.placement import IntArray
from simulations.balance.divisions import Array, Division
from simulations.balance.expert_loads import ExpertLoads, Rows
from simulations.balance.load_shares import FloatArray
from simulations.balance.policies import Plans
from simulations.balance.run_record import Recorder, UnitRecord
from simulations.balance.sampled_traffic import LayerTraffic, SampledTraffic, sends_of
from simulations.cost import CostModel, StepWork

WARM_UP_LOOKS = 4
"""That the first plans are made from, as long together as one of the others."""
TRAFFIC_STEPS = 500
"""Between two samples of tokens; layers that change are looked at again with the same tokens."""
SAMPLED_TOKENS = 256
FLIP_STEPS = 8
"""Layers change between blocks of so many steps at least, up to so many later than they could."""


@dataclass(frozen=True, kw_only=True)
class Clock:
    """steps: of the run; interval: between two looks."""

    steps: int
    interval: int

    @property
    def warm_up(self) -> int:
        """Steps before the first one of the run."""
        return max(WARM_UP_LOOKS, self.interval)

    def blocks(self) -> Iterator[tuple[int, int]]:
        for start in range(0, self.steps, self.interval):
            yield start, min(start + self.interval, self.steps)

    def warm_up_counts(self, loads: ExpertLoads) -> list[IntArray]:
        """[L, E] of each look before the start."""
        ends = [self.warm_up * n // WARM_UP_LOOKS for n in range(WARM_UP_LOOKS + 1)]
        return [loads.counts(start, stop).sum(axis=(0, 1)) for start, stop in pairwise(ends)]


class PolicyRun:
    """One policy's placement, division, clock and record.

    slowdown: of steps during which experts are under way. extra_s: per layer, what dividing costs.
    """

    def __init__(
        self,
        plans: Plans,
        division: Division,
        cost: CostModel,
        work: StepWork,
        slowdown: float,
        extra_s: float,
        recorder: Recorder,
    ) -> None:
        self.plans, self.recorder = plans, recorder
        self._division, self._cost, self._work = division, cost, work
        self._slowdown = slowdown
        self._extra_s = extra_s * plans.placement.num_layers
        self._traffic = SampledTraffic(cost.deployment)
        self._layers: list[LayerTraffic] = []
        self._rows_LTK: Rows | None = None
        self._source_T = np.zeros(0, dtype=np.int64)
        self._planned_L, self._planned_difference_L = np.zeros((2, plans.placement.num_layers))
        self._now_s = self._step_s = self._pause_s = 0.0
        self._follow(range(plans.placement.num_layers))

    def sample(self, rows_OLMK: Rows) -> None:
        """Look where these tokens go from now on."""
        origins, layers, tokens, top_k = rows_OLMK.shape
        self._rows_LTK = rows_OLMK.transpose(1, 0, 2, 3).reshape(layers, -1, top_k)
        per_rank = origins * tokens // self._cost.deployment.num_ranks
        self._source_T = np.arange(origins * tokens) // per_rank
        self._layers = [self._sampled(layer) for layer in range(layers)]

    def serve(self, counts_BOLE: IntArray) -> None:
        """The next batches."""
        while len(counts_BOLE):
            steps = self._until_change(len(counts_BOLE))
            self._serve(counts_BOLE[:steps])
            counts_BOLE = counts_BOLE[steps:]
            if changed := self.plans.advance(self._now_s):
                self._follow(changed)

    def look(self, counts_LE: IntArray, step: int) -> None:
        """After the block that ends with `step`."""
        self._pause_s = self.plans.look(counts_LE, step, self._now_s)
        if changed := self.plans.advance(self._now_s):
            self._follow(changed)

    def _serve(self, counts_BOLE: IntArray) -> None:
        slot_BLS = self._division.slots(counts_BOLE)
        times = self._cost.step(self._work, slot_BLS, sends_of(self._layers))
        under_way = self.plans.next_change_s() < math.inf
        bare_B = times.total_B + self._extra_s
        with_moves_B = bare_B * (1 + self._slowdown * under_way)
        with_moves_B[0] += self._pause_s
        self._pause_s = 0.0
        self._now_s += float(with_moves_B.sum())
        self._step_s = float(with_moves_B[-1])
        rank_BLR = _by_rank(slot_BLS, self._cost.deployment.num_ranks)
        self.recorder.add(
            rank_BLR,
            times.layers,
            bare_B,
            with_moves_B,
            self._planned_L,
            self._planned_difference_L,
            self._layers,
        )

    def _until_change(self, most: int) -> int:
        left_s = self.plans.next_change_s() - self._now_s
        if left_s == math.inf:
            return most
        steps = math.ceil(left_s / self._step_s) if self._step_s else 1
        return min(most, max(FLIP_STEPS, steps))

    def _follow(self, changed: list[int] | range) -> None:
        self._division.follow(self.plans.placement, changed)
        load_LE = self.plans.load_LE
        # Large whole numbers, so that rounding does not matter.
        counts_LE = np.rint(load_LE * (1e8 / load_LE.sum(axis=1, keepdims=True))).astype(np.int64)
        for layer in changed:
            slot_BLS = self._division.slots(counts_LE[None, None, [layer]], slice(layer, layer + 1))
            rank_R = _by_rank(slot_BLS, self._cost.deployment.num_ranks)[0, 0]
            self._planned_L[layer] = rank_R.max() / rank_R.mean()
            self._planned_difference_L[layer] = (rank_R.max() - rank_R.min()) / rank_R.mean()
            if self._layers:
                self._layers[layer] = self._sampled(layer)

    def _sampled(self, layer: int) -> LayerTraffic:
        assert self._rows_LTK is not None
        slots_TK = self._division.choose(layer, self._rows_LTK[layer], self._source_T)
        return self._traffic.of_layer(slots_TK, self._source_T)


def run_unit(
    loads: ExpertLoads,
    runs: dict[str, PolicyRun],
    clock: Clock,
    num_ranks: int,
    *,
    stop: Callable[[], bool] = lambda: False,
    done: Callable[[int], None] = lambda steps: None,
) -> UnitRecord:
    """All steps, or those until `stop` says so; `done` hears how many steps are."""
    load_LE: FloatArray | float = 0.0
    sampled_at = -TRAFFIC_STEPS
    for start, end in clock.blocks():
        if stop():
            break
        counts_BOLE = loads.counts(clock.warm_up + start, clock.warm_up + end)
        if start - sampled_at >= TRAFFIC_STEPS:
            sampled_at = start
            per_rank = -(-SAMPLED_TOKENS // num_ranks)
            rows = loads.rows(clock.warm_up + end - 1, per_rank * num_ranks // loads.num_origins)
            for run in runs.values():
                run.sample(rows)
        counts_LE = counts_BOLE.sum(axis=(0, 1))
        for run in runs.values():
            run.serve(counts_BOLE)
            run.look(counts_LE, end - 1)
        load_LE = load_LE + counts_LE
        done(end)
    return UnitRecord(
        load_LE=np.asarray(load_LE),
        policies={name: run.recorder.record(run.plans.rebalances) for name, run in runs.items()},
    )


def _by_rank(slot_BLS: Array, num_ranks: int) -> Array:
    """[B, L, R], in float64: sums of whole numbers stay exact."""
    slot_BLRP = slot_BLS.reshape(*slot_BLS.shape[:2], num_ranks, -1)
    rank_BLR: Array = slot_BLRP.sum(axis=-1, dtype=np.float64)
    return rank_BLR
