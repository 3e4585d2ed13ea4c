"""How the tokens of one batch divide over the copies of their experts, so that ranks end up even.

The counts of the batch decide, and nothing else: every rank that knows them finds the same division,
in integers. The least possible maximum T over the ranks' tokens is exact: T is feasible unless some
set of ranks has more tokens of experts that only it holds than T for each of its ranks (Hall). Each
infeasible T shows such a set, whose mean is the next T (Dinkelbach's iteration on the minimum cut).
Below T, too, ranks are as even as can be (even_levels.py).

N nodes, E logical experts, C most copies of any expert (as in logical_to_physical), R ranks,
A experts with a choice: copies on several ranks; an edge is one (such expert, rank that holds it).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from router.even_levels import EvenLevels
from router.flow import Flow
from router.placement import IntArray, LayerPlacement, Placement

_UNIT = 1 << 16  # speeds are multiples of 1/_UNIT, so that every rank rounds alike
_TOKENS = 1 << 30  # mean loads become integers of this sum, whatever their unit was


class Copies(NamedTuple):
    """several_A: experts with a choice; single: all others, which have their first copy only. An edge:
    expert (place in several_A), copy, slot."""

    several_A: IntArray
    single: IntArray
    edge_expert: IntArray
    edge_copy: IntArray
    edge_slot: IntArray


def usable_copies(layer: LayerPlacement) -> Copies:
    """Those that tokens may go to: of an expert's copies on one rank only the first."""
    slots_EC = layer.logical_to_physical
    ranks_EC = np.where(slots_EC >= 0, slots_EC // layer.slots_per_rank, -1)
    # Slots ascend, so copies on one rank are neighbours.
    usable_EC = (ranks_EC >= 0) & (np.diff(ranks_EC, axis=1, prepend=-1) != 0)
    choice_E = usable_EC.sum(axis=1) > 1
    several_A = np.flatnonzero(choice_E)
    expert, copy = np.nonzero(usable_EC[several_A])
    return Copies(
        several_A, np.flatnonzero(~choice_E), expert, copy, slots_EC[several_A[expert], copy]
    )


class LayerSplit:
    """The copies of one layer, prepared for many batches.

    rank_speeds [R]: relative, None = all alike; a rank's load is its tokens divided by its speed,
    where 1 is the mean speed. Of an expert's copies on one rank only the first is used.
    Raises ValueError for speeds that are not one positive number per rank.
    """

    def __init__(
        self,
        layer: LayerPlacement,
        rank_speeds: Sequence[float] | NDArray[np.float64] | None = None,
    ) -> None:
        self.layer = layer
        self._max_copies = layer.logical_to_physical.shape[1]
        self._speeds_R = _integer_speeds(rank_speeds, layer.num_ranks)
        self._speeds: list[int] = self._speeds_R.tolist()
        slots_EC = layer.logical_to_physical
        self.copies = copies = usable_copies(layer)
        self._several, self._single = copies.several_A, copies.single
        self._rank_of_single = slots_EC[self._single, 0] // layer.slots_per_rank
        self._edge_expert, self._edge_copy = copies.edge_expert, copies.edge_copy
        self._edge_rank = copies.edge_slot // layer.slots_per_rank
        self._edge_node = self._edge_rank * layer.slots_per_rank // layer.slots_per_node
        alike = self._edge_node * len(self._several) + self._edge_expert
        self._edge_alike = np.bincount(alike)[alike]  # edges of one expert to one node
        self._node_AC = slots_EC[self._several] // layer.slots_per_node  # -1 stays -1
        self._first_on_node_AC = _first_alike(self._node_AC)
        self._flow = Flow(
            self._edge_expert.tolist(),
            self._edge_rank.tolist(),
            num_experts=len(self._several),
            num_ranks=layer.num_ranks,
        )
        unit = int(np.gcd.reduce(self._speeds_R))
        self._levels = EvenLevels(self._flow, (self._speeds_R // unit).tolist())
        of_expert, of_rank = self._flow.components()
        self._component = np.array(of_rank + of_expert, dtype=np.int64)
        self._component_speed = np.bincount(of_rank, weights=self._speeds_R).astype(np.int64)

    @property
    def has_choice(self) -> bool:
        """Whether any expert has copies on several ranks."""
        return len(self._several) > 0

    def optimum(self, counts_E: IntArray) -> int:
        """The least integer T such that no rank needs more than T tokens, or T times its speed."""
        return self._solve(np.asarray(counts_E, dtype=np.int64))

    def imbalance(self, counts_E: IntArray) -> float:
        """optimum / mean; 1 without tokens."""
        total = int(np.sum(counts_E))
        return self.optimum(counts_E) * self.layer.num_ranks / total if total else 1.0

    def divide(self, counts_NE: IntArray, slack: float = 0.0) -> IntArray:
        """quotas [N, E, C]: how many tokens of each expert go from each node to each copy.

        They add up to counts_NE. Without slack ranks are as even as can be (even_levels.py): the
        greatest load is the optimum, then the second is least, and so on. With slack each may get
        (1 + slack) times that. Within this room nearly as many tokens stay on their node as can: each
        rank first takes what is at home, and only as much of it moves, by shortest paths, as others
        need to find a place.
        """
        counts_NE = np.asarray(counts_NE, dtype=np.int64)
        flow, base_R, load_R, is_only = self._even(counts_NE.sum(axis=0))
        if len(counts_NE) > 1 and (slack or not is_only):
            room_R = (load_R * (1.0 + slack)).astype(np.int64) - base_R
            flow = self._from_home(counts_NE[:, self._several], room_R)
        return self._quotas(np.array(flow, dtype=np.int64), counts_NE)

    def by_copy(self, counts_E: IntArray) -> IntArray:
        """[E, C]: tokens of each copy, wherever they come from; ranks are as even as can be."""
        counts_E = np.asarray(counts_E, dtype=np.int64)
        flow = self._even(counts_E)[0]
        tokens_EC = np.zeros((len(counts_E), self._max_copies), dtype=np.int64)
        tokens_EC[self._single, 0] = counts_E[self._single]
        tokens_EC[self._several[self._edge_expert], self._edge_copy] = flow
        return tokens_EC

    def divide_experts(self, counts_NE: IntArray) -> IntArray:
        """quotas [N, E, C] with all tokens of an expert on one copy, for steps bound by memory.

        The most experts with tokens on a rank are as few as can be. Among such choices, experts with
        most tokens on a copy's node choose that copy first, as long as there is room.
        """
        counts_NE = np.asarray(counts_NE, dtype=np.int64)
        active_E = (counts_NE.sum(axis=0) > 0).astype(np.int64)
        level, base_R = self._solve(active_E), self._base(active_E)
        at_home = counts_NE[:, self._several][self._edge_node, self._edge_expert]
        room = (level * self._speeds_R // _UNIT - base_R).tolist()
        free, left, start = active_E[self._several].tolist(), list(room), [0] * len(at_home)
        for edge in np.argsort(-at_home, kind="stable").tolist():
            expert, rank = self._flow.experts[edge], self._flow.ranks[edge]
            if free[expert] and left[rank]:
                start[edge] = 1
                free[expert] -= 1
                left[rank] -= 1
        flow, _ = self._flow.fill(active_E[self._several].tolist(), room, start)
        tokens_A = counts_NE.sum(axis=0)[self._several]
        return self._quotas(np.array(flow, dtype=np.int64) * tokens_A[self._edge_expert], counts_NE)

    # -- the optimum -------------------------------------------------------------------------

    def _solve(self, counts_E: IntArray) -> int:
        base_R = self._base(counts_E)
        base, tokens = base_R.tolist(), counts_E[self._several].tolist()
        level = self._lower_bound(base_R, counts_E)
        while True:
            room = [
                level * speed // _UNIT - own for speed, own in zip(self._speeds, base, strict=True)
            ]
            _, bottlenecks = self._flow.fill(tokens, room)
            if not bottlenecks:
                return level
            level += 1
            for experts, ranks in bottlenecks:
                load = sum([tokens[e] for e in experts]) + sum([base[r] for r in ranks])
                level = max(level, -(-load * _UNIT // sum([self._speeds[r] for r in ranks])))

    def _lower_bound(self, base_R: IntArray, counts_E: IntArray) -> int:
        """Each rank's own tokens, and the mean of each component of the graph."""
        load = np.concatenate([base_R, counts_E[self._several]])
        total = np.bincount(self._component, weights=load).astype(np.int64)
        own = -(-base_R * _UNIT // self._speeds_R)
        return max(int(own.max()), int((-(-total * _UNIT // self._component_speed)).max()))

    def _even(self, counts_E: IntArray) -> tuple[list[int], IntArray, IntArray, bool]:
        """Tokens of each edge, with ranks as even as can be; the ranks' tokens without a choice, and
        all of them; whether no other flow leads to these."""
        base_R, tokens = self._base(counts_E), counts_E[self._several].tolist()
        flow, is_only = self._levels.fill(tokens, base_R.tolist())
        load_R = self._load(base_R, flow)
        if self._speeds_R.min() < self._speeds_R.max():  # rounding the optimum may leave less room
            most_R = self._solve(counts_E) * self._speeds_R // _UNIT
            if (load_R > most_R).any():
                flow, _ = self._flow.fill(tokens, (np.minimum(load_R, most_R) - base_R).tolist())
                flow, _ = self._flow.fill(tokens, (most_R - base_R).tolist(), flow)
                load_R, is_only = self._load(base_R, flow), False
        return flow, base_R, load_R, is_only

    def _base(self, counts_E: IntArray) -> IntArray:
        """[R]: tokens that have no other rank to go to."""
        single_R = np.bincount(
            self._rank_of_single, weights=counts_E[self._single], minlength=self.layer.num_ranks
        )
        return single_R.astype(np.int64)

    def _load(self, base_R: IntArray, flow: list[int]) -> IntArray:
        flow_R = np.bincount(self._edge_rank, weights=flow, minlength=len(base_R))
        return base_R + flow_R.astype(np.int64)

    # -- who sends to which copy -------------------------------------------------------------

    def _quotas(self, tokens: IntArray, counts_NE: IntArray) -> IntArray:
        """[N, E, C], from the tokens of each edge."""
        quotas_AC = np.zeros((len(self._several), self._max_copies), dtype=np.int64)
        quotas_AC[self._edge_expert, self._edge_copy] = tokens
        quotas_NEC = np.zeros((*counts_NE.shape, self._max_copies), dtype=np.int64)
        quotas_NEC[:, self._single, 0] = counts_NE[:, self._single]
        quotas_NEC[:, self._several] = self._by_source(quotas_AC, counts_NE[:, self._several])
        return quotas_NEC

    def _from_home(self, counts_NA: IntArray, room_R: IntArray) -> list[int]:
        """Tokens of each edge, no rank above `level`: first those of its own node, as far as they
        fit beside each other, then all others."""
        home = counts_NA[self._edge_node, self._edge_expert] // self._edge_alike
        wanted_R = np.zeros_like(room_R)
        np.add.at(wanted_R, self._edge_rank, home)
        home = home * np.minimum(room_R, wanted_R)[self._edge_rank]
        home //= np.maximum(wanted_R, 1)[self._edge_rank]
        flow, _ = self._flow.fill(counts_NA.sum(axis=0).tolist(), room_R.tolist(), home.tolist())
        return flow

    def _by_source(self, quotas_AC: IntArray, counts_NA: IntArray) -> IntArray:
        """[N, A, C]: each node fills its own copies first, then what is left in ascending order."""
        before_AC = np.cumsum(quotas_AC, axis=1) - quotas_AC
        before_AC -= np.take_along_axis(before_AC, self._first_on_node_AC, axis=1)
        experts_A1 = np.arange(len(quotas_AC))[:, None]
        home_AC = np.clip(counts_NA[self._node_AC, experts_A1] - before_AC, 0, quotas_AC)
        quotas_NAC = np.zeros((*counts_NA.shape, quotas_AC.shape[1]), dtype=np.int64)
        quotas_NAC[self._node_AC, experts_A1, np.arange(quotas_AC.shape[1])] = home_AC
        leaving_NA1 = (counts_NA - quotas_NAC.sum(axis=2))[:, :, None]
        open_AC = quotas_AC - home_AC
        sent_NA1, taken_AC = np.cumsum(leaving_NA1, axis=0), np.cumsum(open_AC, axis=1)
        until = np.minimum(sent_NA1, taken_AC)
        since = np.maximum(sent_NA1 - leaving_NA1, taken_AC - open_AC)
        quotas_NAC += np.maximum(until - since, 0)
        return quotas_NAC


def _first_alike(values_AC: IntArray) -> IntArray:
    """[A, C]: the first position in its row that holds the same value; alike are neighbours."""
    starts = np.diff(values_AC, axis=1, prepend=-2) != 0
    places_AC = np.where(starts, np.arange(values_AC.shape[1]), 0)
    return np.asarray(np.maximum.accumulate(places_AC, axis=1))


def _integer_speeds(
    rank_speeds: Sequence[float] | NDArray[np.float64] | None, num_ranks: int
) -> IntArray:
    """In units of 1/_UNIT of the mean speed."""
    if rank_speeds is None:
        return np.full(num_ranks, _UNIT, dtype=np.int64)
    speeds_R = np.asarray(rank_speeds, dtype=np.float64)
    if speeds_R.shape != (num_ranks,) or not np.isfinite(speeds_R).all() or speeds_R.min() <= 0:
        raise ValueError(
            f"rank_speeds must be {num_ranks} positive numbers, one per rank, got {rank_speeds}"
        )
    units_R = np.rint(speeds_R / speeds_R.mean() * _UNIT).astype(np.int64)
    return np.asarray(np.maximum(1, units_R))


def whole(load_E: NDArray[np.float64]) -> IntArray:
    """The load in integers of a sum that rounding does not matter to; no load stays none."""
    scale = _TOKENS / (load_E.sum() or 1.0)
    tokens_E: IntArray = np.rint(load_E * scale).astype(np.int64)
    return tokens_E


def resplit_optima(
    mean_LE: NDArray[np.float64],
    placement: Placement,
    rank_speeds: Sequence[float] | NDArray[np.float64] | None = None,
) -> NDArray[np.float64]:
    """[L]: max / mean over ranks of each layer's load, divided over the present copies as well as can be."""
    return np.array(
        [
            LayerSplit(placement.layer(layer), rank_speeds).imbalance(whole(mean_E))
            for layer, mean_E in enumerate(mean_LE)
        ]
    )
