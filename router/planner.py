"""Placements from loads: which slots hold which experts, for all layers at once.

A plan without a current placement cuts each layer's load exactly (full_plan.py). From a current
placement it moves as little as it can (few_moves.py): nothing while the re-split optimum, the best
that dividing tokens over the present copies can do, meets the target.

L layers, E logical experts, R ranks, N nodes, S slots of all ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from router.few_moves import few_moves
from router.full_plan import full_plan
from router.load import ExpertLoad
from router.placement import IntArray, Placement, settle
from router.ranks import Ranks, num_moves, whole

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

    z: float = 1.0
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
    options: PlanOptions | None = None,
) -> Plan:
    """A placement for `load`, at the epoch after `current` (0 without one).

    Pure: equal arguments give equal plans in every process. Raises ValueError for sizes that do not
    fit, naming them.
    """
    options = options or PlanOptions()
    ranks = _ranks(load, num_ranks, slots_per_rank, ranks_per_node, current, options)
    sigma_LE = np.zeros_like(load.mean_LE) if load.sigma_LE is None else load.sigma_LE
    rows, layers = [], []
    for layer, (mean_E, sigma_E) in enumerate(zip(load.mean_LE, sigma_LE, strict=True)):
        mean_E = mean_E if mean_E.any() else np.ones_like(mean_E)
        present = None if current is None else current.physical_to_logical[layer]
        row, explained = _plan_layer(mean_E, sigma_E, present, ranks, options)
        rows.append(row)
        layers.append(explained)
    placement = Placement(
        physical_to_logical=np.stack(rows),
        num_experts=load.mean_LE.shape[1],
        num_ranks=num_ranks,
        ranks_per_node=ranks_per_node,
        epoch=0 if current is None else current.epoch + 1,
    )
    return Plan(placement=placement, layers=tuple(layers))


def _ranks(
    load: ExpertLoad,
    num_ranks: int,
    slots_per_rank: int,
    ranks_per_node: int | None,
    current: Placement | None,
    options: PlanOptions,
) -> Ranks:
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


def _plan_layer(
    mean_E: FloatArray,
    sigma_E: FloatArray,
    present_S: IntArray | None,
    ranks: Ranks,
    options: PlanOptions,
) -> tuple[IntArray, LayerPlan]:
    bound, score_E = _lower_bound(mean_E, ranks), mean_E + options.z * sigma_E
    if present_S is None:
        row_S, after = full_plan(mean_E, score_E, ranks)
        reason = f"full plan: {after:.3f}"
        return row_S, LayerPlan(imbalance=after, lower_bound=bound, moves=0, reason=reason)

    before = ranks.imbalance(present_S, mean_E)
    if before <= options.target:
        reason = f"kept: re-split optimum {before:.3f} <= target {options.target:.3f}"
        return present_S, LayerPlan(imbalance=before, lower_bound=bound, moves=0, reason=reason)

    most = ranks.num_slots if options.max_moves is None else options.max_moves
    row_S, moves, reached = _moved(mean_E, present_S, ranks, options.target, most)
    after = ranks.imbalance(row_S, mean_E)
    if not reached:
        anew_S, imbalance = full_plan(mean_E, score_E, ranks, present_S)
        all_moves = num_moves(present_S, anew_S, ranks.slots_per_rank)
        if all_moves <= most and after - imbalance > _WORTH * (all_moves - moves):
            reason = f"full plan, {all_moves} moves: {before:.3f} -> {imbalance:.3f}"
            return anew_S, LayerPlan(
                imbalance=imbalance, lower_bound=bound, moves=all_moves, reason=reason
            )
    if after >= before:
        reason = f"kept: no {most} moves improve on {before:.3f}"
        return present_S, LayerPlan(imbalance=before, lower_bound=bound, moves=0, reason=reason)
    short = "" if reached else f", target {options.target:.3f} not reached"
    reason = f"{moves} moves: {before:.3f} -> {after:.3f}{short}"
    return row_S, LayerPlan(imbalance=after, lower_bound=bound, moves=moves, reason=reason)


def _moved(
    mean_E: FloatArray, present_S: IntArray, ranks: Ranks, target: float, most: int
) -> tuple[IntArray, int, bool]:
    """(row after moves, how many experts moved, whether the target is reached)."""
    load_E = whole(mean_E)
    caps_R = (load_E.sum() / ranks.num_ranks * target * ranks.speed_R).astype(np.int64)
    slots, reached = few_moves(
        present_S.reshape(ranks.num_ranks, -1).tolist(), load_E.tolist(), caps_R.tolist(), most
    )
    row_S = settle(present_S, np.array(slots).ravel(), ranks.slots_per_rank)
    return row_S, num_moves(present_S, row_S, ranks.slots_per_rank), reached


def _lower_bound(mean_E: FloatArray, ranks: Ranks) -> float:
    """The mean, or an expert whose copies, as many as slots and ranks allow, are not enough."""
    copies = ranks.num_slots - len(mean_E) + 1
    fastest = np.sort(ranks.speed_R)[::-1][:copies].sum()
    return max(1.0, float(mean_E.max() * ranks.num_ranks / (mean_E.sum() * fastest)))
