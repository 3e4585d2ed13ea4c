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

from cluster.rebalance_draft import Draft, draft
from comms.topology import Topology
from router.load import ExpertLoad, LoadWindow
from router.placement import IntArray, Placement, settle
from router.planner import plan
from router.policy import Policy, PolicyOptions
from simulations.eplb import eplb
from simulations.load_shares import FloatArray

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
        rows = dict(drafted.rows)
        moves = 0
        for effect in sorted(drafted.effects, key=lambda e: (-e.imbalance_before, e.layer)):
            if effect.layer in rows and self._policy.pays(
                effect.imbalance_before,
                effect.imbalance_after,
                effect.moves,
                present.num_layers,
                present.num_ranks,
            ):
                row_S = rows[effect.layer]
                seconds = transfer_seconds(present, effect.layer, row_S, options)
                self._coming.append((effect.layer, row_S, seconds))
                moves += effect.moves
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


def transfer_seconds(
    present: Placement, layer: int, row_S: IntArray, options: PolicyOptions
) -> float:
    """Until all ranks have what they lack for `row_S`, each from the nearest holder, as
    `experts/supply.py` asks them; no rank sends or receives faster than the bandwidth."""
    sent_R, received_R = np.zeros((2, present.num_ranks), dtype=np.int64)
    per_node = present.ranks_per_node or present.num_ranks
    for move in present.with_layers({layer: row_S}).moves_from(present):
        rank = move.slot // present.slots_per_rank
        slots = np.flatnonzero(present.physical_to_logical[layer] == move.expert)
        holders = np.roll(slots, rank) // present.slots_per_rank
        near = holders[holders // per_node == rank // per_node]
        sent_R[(near if len(near) else holders)[0]] += 1
        received_R[rank] += 1
    most = int(max(sent_R.max(), received_R.max()))
    return most * options.bytes_per_expert / options.bandwidth


def arrivals(row_LS: IntArray, before_LS: IntArray, slots_per_rank: int) -> IntArray:
    """[L, R]: slots whose expert their rank did not hold before."""
    shape = (len(row_LS), -1, slots_per_rank)
    row_LRP, before_LRP = row_LS.reshape(shape), before_LS.reshape(shape)
    held_LRP = (row_LRP[..., :, None] == before_LRP[..., None, :]).any(axis=-1)
    return np.asarray((~held_LRP & (row_LRP >= 0)).sum(axis=-1))


def relabelled(row_S: IntArray, before_S: IntArray, slots_per_rank: int) -> IntArray:
    """The same plan for other ranks: pairs of planned and present ranks with most experts in common
    first, then pairs of pairs exchange partners while more experts stay that way."""
    before_RP, row_RP = (r.reshape(-1, slots_per_rank) for r in (before_S, row_S))
    experts = int(max(before_S.max(), row_S.max())) + 2
    has_before, has_planned = np.zeros((2, len(row_RP), experts), dtype=np.int64)
    each = np.arange(len(row_RP))[:, None]
    has_before[each, before_RP] = has_planned[each, row_RP] = 1
    common_RR = (has_before[:, :-1] @ has_planned[:, :-1].T).astype(np.int64)  # -1 went last
    become_R = _greedy_pairs(common_RR)
    while True:
        kept_RR = common_RR[:, become_R]
        own_R = np.diagonal(kept_RR)
        gain_RR = kept_RR + kept_RR.T - own_R[:, None] - own_R
        first, second = divmod(int(gain_RR.argmax()), len(gain_RR))
        if gain_RR[first, second] <= 0:
            break
        become_R[[first, second]] = become_R[[second, first]]
    return settle(before_S, row_RP[become_R].ravel(), slots_per_rank)


def _greedy_pairs(common_RR: IntArray) -> IntArray:
    """[R]: which planned rank each present rank becomes."""
    left_RR = common_RR.copy()
    become_R = np.empty(len(left_RR), dtype=np.int64)
    for _ in left_RR:
        rank, planned = divmod(int(left_RR.argmax()), len(left_RR))
        become_R[rank] = planned
        left_RR[rank], left_RR[:, planned] = -1, -1
    return become_R


def _placement(row_LS: IntArray, experts: int, topology: Topology, epoch: int = 0) -> Placement:
    return Placement(
        physical_to_logical=row_LS,
        num_experts=experts,
        num_ranks=topology.world_size,
        ranks_per_node=topology.ranks_per_node,
        epoch=epoch,
    )
