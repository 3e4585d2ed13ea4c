"""Placements from loads: which slots hold which experts, for all layers at once.

A plan without a current placement cuts each layer's load exactly (full_plan.py). From a current
placement it moves as little as it can (few_moves.py): nothing while the re-split optimum, the best
that dividing tokens over the present copies can do, meets the target.

L layers, E logical experts, R ranks, N nodes, S slots of all ranks.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from router.affinity import plan_layer
from router.few_moves import few_moves
from router.full_plan import FullPlan, full_plan
from router.load import ExpertLoad
from router.placement import IntArray, Placement, settle
from router.ranks import Ranks, num_moves
from router.split import whole

FloatArray = NDArray[np.float64]

_WORTH = 2e-4  # how much a move of a full plan should lower the imbalance, at least


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """z: plan for mean + z * sigma where one must choose. target: the imbalance (max / mean of the
    ranks' loads) that is good enough to keep copies where they are.

    objective "tokens" balances tokens; "experts" the number of experts that are active in a batch,
    which is what a decode step costs that is bound by reading weights: then mean_LE holds the
    probability that an expert is active, and each of its batches goes to one copy.
    rank_speeds [R]: relative, None = alike. node_traffic: weight of tokens that cross nodes, 0 = off.
    max_moves: the most experts that may move in a layer, None = any number.
    """

    z: float = 0.5
    target: float = 1.02
    objective: Literal["tokens", "experts"] = "tokens"
    rank_speeds: tuple[float, ...] | None = None
    node_traffic: float = 0.0
    max_moves: int | None = None

    def __post_init__(self) -> None:
        if self.z < 0 or self.target < 1 or self.node_traffic < 0 or (self.max_moves or 0) < 0:
            raise ValueError(
                f"Invalid options: z({self.z}), node_traffic({self.node_traffic}) and max_moves("
                f"{self.max_moves}) must be >= 0, target({self.target}) >= 1"
            )
        if self.objective not in ("tokens", "experts"):
            raise ValueError(f"objective {self.objective!r} is neither 'tokens' nor 'experts'")


@dataclass(frozen=True, kw_only=True)
class LayerPlan:
    """What one layer's plan promises. imbalance: of the planned load, tokens divided as well as the
    copies allow. lower_bound: no placement in these slots is better. moves: experts new to a rank.
    """

    imbalance: float
    lower_bound: float
    moves: int
    reason: str


@dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    placement: Placement
    layers: tuple[LayerPlan, ...]

    @property
    def moves(self) -> int:
        """Experts that are new to their rank, over all layers."""
        return sum(layer.moves for layer in self.layers)


def plan(
    load: ExpertLoad,
    *,
    num_ranks: int,
    slots_per_rank: int,
    ranks_per_node: int | None = None,
    current: Placement | None = None,
    layers: Collection[int] | None = None,
    options: PlanOptions | None = None,
) -> Plan:
    """A placement for `load`, at the epoch after `current` (0 without one).

    layers: those of `current` that may change, None = all.
    Pure: equal arguments give equal plans in every process. Raises ValueError for sizes that do not
    fit, naming them.
    """
    options = options or PlanOptions()
    ranks = _ranks(load, num_ranks, slots_per_rank, ranks_per_node, current, options)
    planned = [
        _Layer(load, layer, ranks, options).plan(
            None if current is None else current.physical_to_logical[layer],
            may_change=layers is None or layer in layers,
        )
        for layer in range(len(load.mean_LE))
    ]
    placement = Placement(
        physical_to_logical=np.stack([row_S for row_S, _ in planned]),
        num_experts=load.mean_LE.shape[1],
        num_ranks=num_ranks,
        ranks_per_node=ranks_per_node,
        epoch=0 if current is None else current.epoch + 1,
    )
    return Plan(placement=placement, layers=tuple(layer for _, layer in planned))


def _ranks(
    load: ExpertLoad,
    num_ranks: int,
    slots_per_rank: int,
    ranks_per_node: int | None,
    current: Placement | None,
    options: PlanOptions,
) -> Ranks:
    """The ranks to plan for; ValueError where something does not fit."""
    layers, experts = load.mean_LE.shape
    per_node = num_ranks if ranks_per_node is None else ranks_per_node
    if min(num_ranks, slots_per_rank, per_node) < 1 or num_ranks % per_node:
        raise ValueError(
            f"num_ranks({num_ranks}) and slots_per_rank({slots_per_rank}) must be >= 1, and "
            f"num_ranks a multiple of ranks_per_node({ranks_per_node})"
        )
    if experts > num_ranks * slots_per_rank or not experts or not layers:
        raise ValueError(
            f"{num_ranks} ranks * {slots_per_rank} slots cannot hold {experts} experts in "
            f"{layers} layers: raise slots_per_rank to {-(-experts // num_ranks)} or more"
        )
    if options.objective == "experts" and load.mean_LE.max() > 1:
        raise ValueError(
            "objective 'experts' takes probabilities of being active as mean_LE, got "
            f"{load.mean_LE.max():g}"
        )
    if current is not None and (
        current.physical_to_logical.shape != (layers, num_ranks * slots_per_rank)
        or current.num_ranks != num_ranks
        or current.num_experts != experts
    ):
        raise ValueError(
            f"The current placement ({current.num_layers} layers, {current.num_experts} experts, "
            f"{current.num_ranks} ranks * {current.slots_per_rank} slots) is not one of {layers} "
            f"layers, {experts} experts, {num_ranks} ranks * {slots_per_rank} slots"
        )
    speed_R = np.asarray(options.rank_speeds or np.ones(num_ranks), dtype=np.float64)
    if speed_R.shape != (num_ranks,) or not np.isfinite(speed_R).all() or speed_R.min() <= 0:
        raise ValueError(f"rank_speeds must be {num_ranks} positive numbers, got {speed_R}")
    return Ranks(
        num_nodes=num_ranks // per_node,
        slots_per_rank=slots_per_rank,
        speed_R=speed_R / speed_R.mean(),
    )


class _Layer:
    """One layer's load, and the ways to plan it."""

    def __init__(self, load: ExpertLoad, layer: int, ranks: Ranks, options: PlanOptions) -> None:
        self.ranks, self.options = ranks, options
        mean_E = load.mean_LE[layer]
        self.mean_E = mean_E if mean_E.any() else np.ones_like(mean_E)
        self.score_E = self.mean_E.copy()
        if load.sigma_LE is not None:
            self.score_E += options.z * load.sigma_LE[layer]
        self.rows_MK = None
        if load.rows_LMK is not None and options.node_traffic > 0 and ranks.num_nodes > 1:
            self.rows_MK = load.rows_LMK[layer]

    def plan(self, present_S: IntArray | None, may_change: bool) -> tuple[IntArray, LayerPlan]:
        if present_S is None:
            row_S, after = self._anew(None)
            return row_S, self._explained(after, 0, f"full plan: {after:.3f}")
        before, target = self.ranks.imbalance(present_S, self.mean_E), self.options.target
        if not may_change or before <= target:
            why = f"re-split optimum {before:.3f} <= target {target:.3f}"
            why = why if may_change else "not to be changed"
            return present_S, self._explained(before, 0, f"kept: {why}")
        return self._changed(present_S, before)

    def _changed(self, present_S: IntArray, before: float) -> tuple[IntArray, LayerPlan]:
        """Few moves; a full plan where they do not reach the target and it is worth its moves."""
        most, target = self.options.max_moves, self.options.target
        most = self.ranks.num_slots if most is None else most
        row_S, reached = self._moved(present_S, most)
        moves = num_moves(present_S, row_S, self.ranks.slots_per_rank)
        after = self.ranks.imbalance(row_S, self.mean_E)
        reason = f"{moves} move{'s' * (moves != 1)}: {before:.3f} -> {after:.3f}"
        if not reached:
            reason += f", target {target:.3f} not reached"
            anew_S, imbalance = self._anew(present_S)
            all_moves = num_moves(present_S, anew_S, self.ranks.slots_per_rank)
            if all_moves <= most and after - imbalance > _WORTH * (all_moves - moves):
                row_S, moves, after = anew_S, all_moves, imbalance
                reason = f"full plan, {moves} moves: {before:.3f} -> {after:.3f}"
        if not moves or after > before:
            return present_S, self._explained(before, 0, f"kept: no moves improve {before:.3f}")
        return row_S, self._explained(after, moves, reason)

    def _moved(self, present_S: IntArray, most: int) -> tuple[IntArray, bool]:
        """(the row after moves, whether the target is reached)."""
        load_E, ranks = whole(self.mean_E), self.ranks
        caps_R = (ranks.capacity_R(load_E) * self.options.target).astype(np.int64)
        slots, reached = few_moves(
            present_S.reshape(ranks.num_ranks, -1).tolist(), load_E.tolist(), caps_R.tolist(), most
        )
        return settle(present_S, np.array(slots).ravel(), ranks.slots_per_rank), reached

    def _anew(self, present_S: IntArray | None) -> FullPlan:
        if self.rows_MK is None or not (self.rows_MK >= 0).any():
            return full_plan(self.mean_E, self.score_E, self.ranks, present_S)
        row_S = plan_layer(
            self.mean_E,
            self.rows_MK,
            num_nodes=self.ranks.num_nodes,
            ranks_per_node=self.ranks.ranks_per_node,
            slots_per_rank=self.ranks.slots_per_rank,
            weight=self.options.node_traffic,
        )
        if present_S is not None:
            row_S = settle(present_S, row_S, self.ranks.slots_per_rank)
        return FullPlan(row_S, self.ranks.imbalance(row_S, self.mean_E))

    def _explained(self, imbalance: float, moves: int, reason: str) -> LayerPlan:
        bound = _lower_bound(self.mean_E, self.ranks)
        return LayerPlan(imbalance=imbalance, lower_bound=bound, moves=moves, reason=reason)


def _lower_bound(mean_E: FloatArray, ranks: Ranks) -> float:
    """The mean, or an expert whose copies, as many as slots and ranks allow, are not enough."""
    copies = ranks.num_slots - len(mean_E) + 1
    fastest = np.sort(ranks.speed_R)[::-1][:copies].sum()
    return max(1.0, float(mean_E.max() * ranks.num_ranks / (mean_E.sum() * fastest)))
