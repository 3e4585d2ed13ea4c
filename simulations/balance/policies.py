"""Which experts are where, and when that changes: what `simulate balance` compares.

    none          experts in order, one copy each; spare slots stay empty
    eplb          EPLB over all ranks, planned anew from the mean of the steps since its last plan
    eplb_relabel  the same plan, its ranks renamed so that more experts stay where they are
    static        our plans and policy; the copy depends on a token's rank
    ours          our plans and policy; each batch divides by its own counts

What moving costs. EPLB's weights are rewritten between two steps, which wait: so many bytes as the
rank with most receives, at the speed of its network link. That is kind to it: servers that do this
report stalls of 0.9 s (vLLM #43219) to 15 s (#24116), for they stage, copy and synchronise. Our experts
come in the background at `bandwidth` per rank, one layer after the other, and steps last
`PolicyOptions.slowdown` longer meanwhile; a layer is in force once all its ranks have theirs. Planning
takes place beside the steps and is free in both.

L layers, E experts, R ranks, P slots of a rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from cluster.rebalance_draft import Draft, draft, worthwhile
from comms.topology import Topology
from router.load import ExpertLoad, LoadWindow
from router.placement import IntArray, Placement
from router.planner import plan
from router.policy import Policy, PolicyOptions
from simulations.balance.expert_moves import arrivals, relabelled, transfer_seconds
from simulations.balance.load_shares import FloatArray
from simulations.eplb import eplb

POLICIES = ("none", "eplb", "eplb_relabel", "static", "ours")


@dataclass(frozen=True, kw_only=True)
class Rebalance:
    """What was begun at the end of `step`. moves: experts new to a rank, in so many layers."""

    step: int
    layers: int
    moves: int
    bytes: int
    pause_s: float


class Plans(Protocol):
    """`load_LE`: what the placement was last planned for. `rebalances`: all since the start."""

    placement: Placement
    load_LE: FloatArray
    rebalances: list[Rebalance]

    def look(self, counts_LE: IntArray, step: int, now_s: float) -> float:
        """Counts of the steps up to `step`, the last included; seconds for which all steps wait."""

    def next_change_s(self) -> float:
        """When the placement changes, infinity if it will not; until then steps are slower."""

    def advance(self, now_s: float) -> list[int]:
        """The layers that have changed by now."""


class Fixed:
    """Experts in order."""

    def __init__(self, load_LE: FloatArray, topology: Topology, slots_per_rank: int) -> None:
        layers, experts = load_LE.shape
        ranks = topology.world_size
        first = Placement.contiguous(layers, experts, ranks).physical_to_logical
        row_LRP = np.full((layers, ranks, slots_per_rank), -1, dtype=np.int64)
        row_LRP[:, :, : first.shape[1] // ranks] = first.reshape(layers, ranks, -1)
        self.placement = _placement(row_LRP.reshape(layers, -1), experts, topology)
        self.load_LE = load_LE
        self.rebalances: list[Rebalance] = []

    def look(self, counts_LE: IntArray, step: int, now_s: float) -> float:
        return 0.0

    def next_change_s(self) -> float:
        return math.inf

    def advance(self, now_s: float) -> list[int]:
        return []


class Eplb:
    """every: steps between plans. link_beta: bytes/s at which a rank receives weights."""

    def __init__(
        self,
        load_LE: FloatArray,
        topology: Topology,
        slots_per_rank: int,
        *,
        every: int,
        expert_bytes: int,
        link_beta: float,
        relabel: bool = False,
    ) -> None:
        self._topology, self._slots_per_rank = topology, slots_per_rank
        self._every, self._relabel = every, relabel
        self._expert_bytes, self._link_beta = expert_bytes, link_beta
        self._planned_at, self._seen_LE = 0, np.zeros(load_LE.shape, dtype=np.int64)
        self.load_LE = load_LE
        self.placement = _placement(self._row(), load_LE.shape[1], topology)
        self.rebalances: list[Rebalance] = []
        self._changed: list[int] = []

    def look(self, counts_LE: IntArray, step: int, now_s: float) -> float:
        self._seen_LE += counts_LE
        if step + 1 - self._planned_at < self._every:
            return 0.0
        self.load_LE = self._seen_LE / (step + 1 - self._planned_at)
        self._planned_at, self._seen_LE = step + 1, np.zeros_like(self._seen_LE)
        row_LS, before_LS = self._row(), self.placement.physical_to_logical
        if self._relabel:
            row_LS = np.stack(
                [
                    relabelled(row_S, before_S, self._slots_per_rank)
                    for row_S, before_S in zip(row_LS, before_LS, strict=True)
                ]
            )
        moves_R = arrivals(row_LS, before_LS, self._slots_per_rank).sum(axis=0)
        self.placement = _placement(
            row_LS, self.load_LE.shape[1], self._topology, self.placement.epoch + 1
        )
        self._changed = np.flatnonzero((row_LS != before_LS).any(axis=1)).tolist()
        pause_s = float(moves_R.max()) * self._expert_bytes / self._link_beta
        moves = int(moves_R.sum())
        self.rebalances.append(
            Rebalance(
                step=step,
                layers=len(self._changed),
                moves=moves,
                bytes=moves * self._expert_bytes,
                pause_s=pause_s,
            )
        )
        return pause_s

    def next_change_s(self) -> float:
        return math.inf

    def advance(self, now_s: float) -> list[int]:
        changed, self._changed = self._changed, []
        return changed

    def _row(self) -> IntArray:
        ranks = self._topology.world_size
        return eplb(self.load_LE, ranks * self._slots_per_rank, 1, self._topology.num_nodes, ranks)


class Ours:
    """The production window, policy and planner. warm_up: counts of a few looks before the start;
    horizon: looks that the window remembers."""

    def __init__(
        self,
        warm_up: Iterable[IntArray],
        topology: Topology,
        slots_per_rank: int,
        options: PolicyOptions,
        *,
        horizon: float = 64.0,
    ) -> None:
        looks = list(warm_up)
        self._window = LoadWindow(*looks[0].shape, horizon=horizon, sample_tokens=0)
        for counts_LE in looks:
            self._window.add(counts_LE)
        self._policy = Policy(options)
        load = self._window.estimate()
        self.load_LE = load.mean_LE
        self.placement = plan(
            load,
            num_ranks=topology.world_size,
            slots_per_rank=slots_per_rank,
            ranks_per_node=topology.ranks_per_node,
        ).placement
        self.rebalances: list[Rebalance] = []
        self._coming: list[tuple[int, IntArray, float]] = []
        """Layers under way: the layer, its row, and how long it takes; the first one first."""
        self._next_s = math.inf

    def look(self, counts_LE: IntArray, step: int, now_s: float) -> float:
        self._window.add(counts_LE)
        if self._coming:
            return 0.0
        decision = self._policy.decide(self._window, self.placement)
        if decision.rebalance:
            load = self._window.estimate()
            target = self._policy.options.target
            drafted = draft(load, self.placement, target=target, only=decision.layers)
            self._begin(drafted, load, step, now_s)
        return 0.0

    def next_change_s(self) -> float:
        return self._next_s

    def advance(self, now_s: float) -> list[int]:
        rows: dict[int, IntArray] = {}
        while self._coming and self._next_s <= now_s:
            layer, row_S, _ = self._coming.pop(0)
            rows[layer] = row_S
            self._next_s += self._coming[0][2] if self._coming else math.inf
        if rows:
            self.placement = self.placement.with_layers(rows)
        return list(rows)

    def _begin(self, drafted: Draft, load: ExpertLoad, step: int, now_s: float) -> None:
        """Start with what pays, as `Rebalancer` does."""
        present, options = self.placement, self._policy.options
        moves_of = {effect.layer: effect.moves for effect in drafted.effects}
        moves = 0
        for layer, row_S in worthwhile(drafted, self._policy, present).rows:
            seconds = transfer_seconds(present, layer, row_S, options)
            self._coming.append((layer, row_S, seconds))
            moves += moves_of[layer]
        if self._coming:
            self.load_LE = load.mean_LE
            self._next_s = now_s + self._coming[0][2]
            self.rebalances.append(
                Rebalance(
                    step=step,
                    layers=len(self._coming),
                    moves=moves,
                    bytes=moves * options.bytes_per_expert,
                    pause_s=0.0,
                )
            )


def _placement(row_LS: IntArray, experts: int, topology: Topology, epoch: int = 0) -> Placement:
    return Placement(
        physical_to_logical=row_LS,
        num_experts=experts,
        num_ranks=topology.world_size,
        ranks_per_node=topology.ranks_per_node,
        epoch=epoch,
    )
