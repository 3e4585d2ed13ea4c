"""What is kept of a run: of every step its times and each layer's imbalance, sums of all else.

B steps, T steps of the run, L layers, E experts, R ranks, N nodes, U groups side by side.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

from simulations.balance.divisions import Array
from simulations.balance.load_shares import FloatArray
from simulations.balance.policies import Rebalance
from simulations.balance.sampled_traffic import LayerTraffic
from simulations.cost import LayerTimes

PARTS = tuple(field.name for field in fields(LayerTimes))
PART_OF_RUN, MOST_STEPS = 10, 500
"""Loads before and after are those of the first and last tenth, of 500 steps at most."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PolicyRecord:
    """imbalance_TL: max / mean over ranks; planned_TL: what the plan in force promised; difference_TL,
    planned_difference: (max - min) / mean, the latter over steps and layers. steps_s_T:
    with what moving experts costs; bare_s_T: without. slowest_R: how often a rank had
    most tokens, ties shared.
    before_LR, after_LR: tokens of each rank / the layer's mean. rows, bytes: per token and layer.
    part_s: seconds of a layer's parts."""

    imbalance_TL: Array
    planned_TL: Array
    difference_TL: Array
    planned_difference: float
    steps_s_T: FloatArray
    bare_s_T: FloatArray
    slowest_R: FloatArray
    before_LR: FloatArray
    after_LR: FloatArray
    node_rows: float
    bytes_NN: FloatArray
    part_s: dict[str, float]
    rebalances: list[Rebalance]

    @property
    def num_steps(self) -> int:
        return len(self.steps_s_T)


@dataclass(frozen=True, kw_only=True, eq=False)
class UnitRecord:
    """One group's: load_LE of all its steps, and what became of it under each policy."""

    load_LE: FloatArray
    policies: dict[str, PolicyRecord]

    @property
    def num_steps(self) -> int:
        return min(record.num_steps for record in self.policies.values())


class Recorder:
    """For one policy and group. steps: most that will come."""

    def __init__(self, steps: int, num_layers: int, num_ranks: int, num_nodes: int) -> None:
        self._imbalance_TL = np.empty((steps, num_layers), dtype=np.float32)
        self._planned_TL = np.empty((steps, num_layers), dtype=np.float32)
        self._difference_TL = np.empty((steps, num_layers), dtype=np.float32)
        self._planned_difference = 0.0
        self._steps_s_T, self._bare_s_T = np.empty((2, steps))
        self._slowest_R = np.zeros(num_ranks)
        self._tenth = min(MOST_STEPS, max(1, steps // PART_OF_RUN))
        self._before_LR, self._tail = np.zeros((num_layers, num_ranks)), list[Array]()
        self._traffic_NN, self._node_rows = np.zeros((num_nodes, num_nodes)), 0.0
        self._part_s = dict.fromkeys(PARTS, 0.0)
        self._done = 0

    def add(
        self,
        rank_BLR: Array,
        parts: LayerTimes,
        bare_s_B: FloatArray,
        steps_s_B: FloatArray,
        planned_L: FloatArray,
        planned_difference_L: FloatArray,
        traffic: list[LayerTraffic],
    ) -> None:
        """Of the next steps. rank_BLR: tokens; bare_s_B: seconds, steps_s_B: with what moves cost."""
        steps, done = len(rank_BLR), self._done
        here = slice(done, done + steps)
        mean_BL = np.maximum(rank_BLR.mean(axis=2), 1e-9)
        most_BL = rank_BLR.max(axis=2)
        slowest_BLR = rank_BLR == most_BL[..., None]
        self._imbalance_TL[here] = np.where(most_BL > 0, most_BL / mean_BL, 1.0)
        self._planned_TL[here] = planned_L
        self._difference_TL[here] = (most_BL - rank_BLR.min(axis=2)) / mean_BL
        self._planned_difference += steps * float(planned_difference_L.mean())
        self._steps_s_T[here], self._bare_s_T[here] = steps_s_B, bare_s_B
        self._slowest_R += (slowest_BLR / slowest_BLR.sum(axis=2, keepdims=True)).sum(axis=(0, 1))
        self._before_LR += rank_BLR[: max(0, self._tenth - done)].sum(axis=0)
        self._keep_tail(rank_BLR)
        self._traffic_NN += steps * np.mean([layer.bytes_NN for layer in traffic], axis=0)
        self._node_rows += steps * float(np.mean([layer.node_rows for layer in traffic]))
        for part in PARTS:
            self._part_s[part] += float(getattr(parts, part).sum(dtype=np.float64))
        self._done += steps

    def record(self, rebalances: list[Rebalance]) -> PolicyRecord:
        done = self._done
        tail_LR = np.concatenate([np.zeros((0, *self._before_LR.shape)), *self._tail])
        layer_steps = max(1, done * self._imbalance_TL.shape[1])
        return PolicyRecord(
            imbalance_TL=self._imbalance_TL[:done],
            planned_TL=self._planned_TL[:done],
            difference_TL=self._difference_TL[:done],
            planned_difference=self._planned_difference / max(1, done),
            steps_s_T=self._steps_s_T[:done],
            bare_s_T=self._bare_s_T[:done],
            slowest_R=self._slowest_R,
            before_LR=_over_mean(self._before_LR),
            after_LR=_over_mean(tail_LR[-self._tenth :].sum(axis=0)),
            node_rows=self._node_rows / max(1, done),
            bytes_NN=self._traffic_NN / max(1, done),
            part_s={part: seconds / layer_steps for part, seconds in self._part_s.items()},
            rebalances=list(rebalances),
        )

    def _keep_tail(self, rank_BLR: Array) -> None:
        """The last tenth, wherever the run may be stopped."""
        self._tail.append(rank_BLR[-self._tenth :].astype(np.float32))
        while sum(len(part) for part in self._tail[1:]) >= self._tenth:
            del self._tail[0]


def _over_mean(rank_LR: FloatArray) -> FloatArray:
    mean_L1 = rank_LR.mean(axis=1, keepdims=True)
    share_LR: FloatArray = np.where(mean_L1 > 0, rank_LR / np.maximum(mean_L1, 1e-300), 1.0)
    return share_LR
