"""Placements from loads: which slots hold which experts, for all layers at once.

A plan without a current placement cuts each layer's load exactly (hub_ring.py, and exact_cut.py for
loads that no ring fits). From a current placement it moves as little as it can: nothing while the
re-split optimum, the best that dividing tokens over the present copies can do, meets the target.

L layers, E logical experts, R ranks, N nodes, S slots of all ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from router.exact_cut import exact_cut
from router.hub_ring import hub_ring
from router.load import ExpertLoad
from router.placement import IntArray, Placement, settle
from router.split import LayerSplit

FloatArray = NDArray[np.float64]

_WHOLE = 1 << 30  # a layer's load as integers for LayerSplit, whatever its unit was


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


@dataclass(frozen=True, kw_only=True, eq=False)
class _Cluster:
    num_ranks: int
    num_nodes: int
    slots_per_rank: int
    speed_R: FloatArray
    """Mean 1."""

    @property
    def ranks_by_position(self) -> IntArray:
        """Neighbours are on different nodes."""
        position = np.arange(self.num_ranks)
        per_node = self.num_ranks // self.num_nodes
        return position % self.num_nodes * per_node + position // self.num_nodes


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
    cluster = _cluster(load, num_ranks, slots_per_rank, ranks_per_node, current, options)
    sigma_LE = np.zeros_like(load.mean_LE) if load.sigma_LE is None else load.sigma_LE
    rows, layers = [], []
    for layer, (mean_E, sigma_E) in enumerate(zip(load.mean_LE, sigma_LE, strict=True)):
        mean_E = mean_E if mean_E.any() else np.ones_like(mean_E)
        present = None if current is None else current.physical_to_logical[layer]
        row, explained = _plan_layer(mean_E, sigma_E, present, cluster, options)
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


def _cluster(
    load: ExpertLoad,
    num_ranks: int,
    slots_per_rank: int,
    ranks_per_node: int | None,
    current: Placement | None,
    options: PlanOptions,
) -> _Cluster:
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
    return _Cluster(
        num_ranks=num_ranks,
        num_nodes=num_ranks // per_node,
        slots_per_rank=slots_per_rank,
        speed_R=speed_R / speed_R.mean(),
    )


def _plan_layer(
    mean_E: FloatArray,
    sigma_E: FloatArray,
    present: IntArray | None,
    cluster: _Cluster,
    options: PlanOptions,
) -> tuple[IntArray, LayerPlan]:
    bound = _lower_bound(mean_E, cluster)
    before = 0.0
    if present is not None:
        before = imbalance(present, mean_E, cluster)
        if before <= options.target:
            reason = f"kept: re-split optimum {before:.3f} <= target {options.target:.3f}"
            return present, LayerPlan(imbalance=before, lower_bound=bound, moves=0, reason=reason)
    bins, exact = _cut(mean_E, mean_E + options.z * sigma_E, cluster)
    row = np.full((cluster.num_ranks, cluster.slots_per_rank), -1)
    for rank, experts in enumerate(bins):
        row[rank, : len(experts)] = experts
    row = _fill(row, mean_E + options.z * sigma_E, cluster)
    flat = row.ravel()
    after = 1.0 if exact else imbalance(flat, mean_E, cluster)
    moves, reason = 0, f"full plan: {after:.3f}"
    if present is not None:
        flat = settle(present, flat, cluster.slots_per_rank)
        moves = num_moves(present, flat, cluster.slots_per_rank)
        reason = f"full plan, {moves} moves: {before:.3f} -> {after:.3f}"
    return flat, LayerPlan(imbalance=after, lower_bound=bound, moves=moves, reason=reason)


def imbalance(row_S: IntArray, load_E: FloatArray, cluster: _Cluster) -> float:
    placement = Placement(
        physical_to_logical=row_S[None],
        num_experts=len(load_E),
        num_ranks=cluster.num_ranks,
        ranks_per_node=cluster.num_ranks // cluster.num_nodes,
    )
    tokens_E = np.rint(load_E * (_WHOLE / load_E.sum())).astype(np.int64)
    return LayerSplit(placement.layer(0), cluster.speed_R).imbalance(tokens_E)


def num_moves(present: IntArray, target: IntArray, slots_per_rank: int) -> int:
    """Experts that a rank holds in `target` and not in `present`."""
    held = zip(
        present.reshape(-1, slots_per_rank).tolist(),
        target.reshape(-1, slots_per_rank).tolist(),
        strict=True,
    )
    return sum(len(set(new) - set(old) - {-1}) for old, new in held)


def _lower_bound(mean_E: FloatArray, cluster: _Cluster) -> float:
    """The mean, or an expert whose copies, as many as slots and ranks allow, are not enough."""
    copies = cluster.num_ranks * cluster.slots_per_rank - len(mean_E) + 1
    fastest = np.sort(cluster.speed_R)[::-1][:copies].sum()
    return max(1.0, float(mean_E.max() * cluster.num_ranks / (mean_E.sum() * fastest)))


def _cut(
    mean_E: FloatArray, score_E: FloatArray, cluster: _Cluster
) -> tuple[list[list[int]], bool]:
    """The experts of each rank, and whether they are known to carry the mean exactly."""
    capacity_R = cluster.speed_R * (mean_E.sum() / cluster.num_ranks)
    order = cluster.ranks_by_position
    if cluster.slots_per_rank == 1:  # nothing can share a rank
        alone = dict(zip(order.tolist(), range(len(mean_E)), strict=False))
        return [[alone[r]] if r in alone else [] for r in range(cluster.num_ranks)], False
    ring = hub_ring(mean_E, score_E, capacity_R, cluster.slots_per_rank, order)
    spare = cluster.num_ranks * cluster.slots_per_rank - len(mean_E)
    if ring.margin > 0 or spare < cluster.num_ranks - 1:
        return ring.experts_of_rank, ring.margin > 0 and spare >= cluster.num_ranks - 1
    even = bool((cluster.speed_R == cluster.speed_R[0]).all())
    cut = exact_cut(mean_E.tolist(), capacity_R[order].tolist(), cluster.slots_per_rank)
    return _spread(cut, cluster), even


def _spread(cut: list[list[int]], cluster: _Cluster) -> list[list[int]]:
    """Bins to ranks of their speed, on nodes that have none of their experts if there is one."""
    bins: list[list[int]] = [[] for _ in cut]
    order = cluster.ranks_by_position.tolist()
    per_node = cluster.num_ranks // cluster.num_nodes
    on_node: list[set[int]] = [set() for _ in range(cluster.num_nodes)]
    for experts, speed in zip(cut, cluster.speed_R[order].tolist(), strict=True):
        rank = min(
            (r for r in order if cluster.speed_R[r] == speed),
            key=lambda r: len(on_node[r // per_node].intersection(experts)),
        )
        bins[rank] = experts
        on_node[rank // per_node].update(experts)
        order.remove(rank)
    return bins


def _fill(row_RS: IntArray, score_E: FloatArray, cluster: _Cluster) -> IntArray:
    """Slots that are left over get copies of the experts with the highest score per copy."""
    copies_E = np.bincount(row_RS[row_RS >= 0], minlength=len(score_E))
    by_node = row_RS.reshape(cluster.num_nodes, -1)
    per_node = cluster.num_ranks // cluster.num_nodes
    order = cluster.ranks_by_position
    for position, slot in np.argwhere(row_RS[order] < 0).tolist():
        rank = order[position]
        here = by_node[rank // per_node]
        allowed = copies_E >= cluster.num_nodes  # already on every node
        on_node = np.zeros(len(score_E), dtype=bool)
        on_node[here[here >= 0]] = True
        allowed |= ~on_node
        allowed[row_RS[rank][row_RS[rank] >= 0]] = False
        if allowed.any():
            expert = int(np.where(allowed, score_E / copies_E, -1.0).argmax())
            row_RS[rank, slot] = expert
            copies_E[expert] += 1
    return row_RS
