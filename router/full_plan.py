"""One layer planned from nothing: every rank's share of the load cut exactly, every slot used.

Where spare slots are too few for that (less than one for each rank but one), whole copies are packed
instead, if that leaves ranks more even.

E experts, R ranks, N nodes, S slots of all ranks.
"""

from __future__ import annotations

from itertools import chain, product
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from router.exact_cut import exact_cut
from router.hub_ring import hub_ring
from router.packed_copies import packed_copies
from router.placement import IntArray, settle
from router.ranks import Ranks

FloatArray = NDArray[np.float64]


class FullPlan(NamedTuple):
    """row_S: physical_to_logical. imbalance: max / mean of the ranks' planned loads."""

    row_S: IntArray
    imbalance: float


def full_plan(
    load_E: FloatArray, score_E: FloatArray, ranks: Ranks, present_S: IntArray | None = None
) -> FullPlan:
    """Plan for load_E. score_E: who should have copies first. `present_S`: what should stay."""
    bins, exact = _cut(load_E, score_E, ranks)
    row_RS = _row(bins, ranks)
    if not exact:
        packed_RS = _row(packed_copies(load_E, ranks), ranks)
        row_RS = min(row_RS, packed_RS, key=lambda row: ranks.imbalance(row.ravel(), load_E))
    if present_S is not None:
        row_RS = row_RS[_most_in_place(row_RS, present_S, ranks)]
    _fill(row_RS, score_E, ranks)
    row_S = row_RS.ravel()
    if present_S is not None:
        row_S = settle(present_S, row_S, ranks.slots_per_rank)
    return FullPlan(row_S, 1.0 if exact else ranks.imbalance(row_S, load_E))


def _row(bins: list[list[int]], ranks: Ranks) -> IntArray:
    """[R, slots]: -1 where a rank has fewer experts than slots."""
    row_RS = np.full((ranks.num_ranks, ranks.slots_per_rank), -1)
    for rank, experts in enumerate(bins):
        row_RS[rank, : len(experts)] = experts
    return row_RS


def _cut(load_E: FloatArray, score_E: FloatArray, ranks: Ranks) -> tuple[list[list[int]], bool]:
    """The experts of each rank, and whether all ranks are known to carry what they should."""
    if ranks.slots_per_rank == 1:
        return _one_each(load_E, ranks), False
    capacity_R = ranks.capacity_R(load_E)
    enough = ranks.num_slots - len(load_E) >= ranks.num_ranks - 1
    for score, heavy in ((score_E, 0.5), (load_E, 0.5), (load_E, 0.9), (load_E, 0.3)):
        ring = hub_ring(load_E, score, capacity_R, ranks.slots_per_rank, ranks.striped, heavy)
        if ring.margin > 0:
            return ring.experts_of_rank, enough
    if not enough:
        return ring.experts_of_rank, False
    cut = exact_cut(load_E.tolist(), capacity_R[ranks.striped].tolist(), ranks.slots_per_rank)
    return _spread(cut, ranks), len(set(ranks.speed_R.tolist())) == 1


def _one_each(load_E: FloatArray, ranks: Ranks) -> list[list[int]]:
    """One expert per rank: each further copy to the one with the most load per copy."""
    spare = ranks.num_ranks - len(load_E)
    load_per_copy = (load_E[:, None] / np.arange(1, spare + 1)).ravel()
    given = np.argsort(-load_per_copy, kind="stable")[:spare] // max(1, spare)
    copies_E = 1 + np.bincount(given, minlength=len(load_E))
    of_rank: list[list[int]] = [[] for _ in range(ranks.num_ranks)]
    experts = np.repeat(np.arange(len(load_E)), copies_E).tolist()
    for rank, expert in zip(ranks.striped.tolist(), experts, strict=True):
        of_rank[rank].append(expert)
    return of_rank


def _spread(cut: list[list[int]], ranks: Ranks) -> list[list[int]]:
    """Shares, in the order of ranks.striped, to ranks. Ranks of one speed swap theirs while that
    leaves fewer copies of an expert on a node that has it already."""
    of_rank: list[list[int]] = [[] for _ in cut]
    for rank, experts in zip(ranks.striped.tolist(), cut, strict=True):
        of_rank[rank] = experts
    per_node, speeds = ranks.ranks_per_node, ranks.speed_R.tolist()

    def repeated(rank: int) -> int:
        first = rank // per_node * per_node
        experts = list(chain.from_iterable(of_rank[first : first + per_node]))
        return len(experts) - len(set(experts))

    improved = True
    while improved:
        improved = False
        crowded = [rank for rank in range(ranks.num_ranks) if repeated(rank)]
        for a, b in product(crowded, range(ranks.num_ranks)):
            if a // per_node == b // per_node or speeds[a] != speeds[b]:
                continue
            before = repeated(a) + repeated(b)
            of_rank[a], of_rank[b] = of_rank[b], of_rank[a]
            if repeated(a) + repeated(b) < before:
                improved = True
            else:
                of_rank[a], of_rank[b] = of_rank[b], of_rank[a]
    return of_rank


def _most_in_place(row_RS: IntArray, present_S: IntArray, ranks: Ranks) -> IntArray:
    """Which planned rank each rank should become, so that many experts stay. Nodes stay together."""
    speeds = ranks.speed_R.reshape(ranks.num_nodes, -1)
    if (
        not np.array_equal(speeds, np.broadcast_to(speeds[:, :1], speeds.shape))
        or len(set(speeds[:, 0].tolist())) > 1
    ):
        return np.arange(ranks.num_ranks)
    common_RR = _has(present_S.reshape(row_RS.shape)) @ _has(row_RS).T
    nodes = (ranks.num_nodes, ranks.ranks_per_node) * 2
    common_NN = common_RR.reshape(nodes).max(axis=3).sum(axis=1)
    become = np.empty(ranks.num_ranks, dtype=np.int64)
    for node, planned in _pairs(common_NN):
        here = slice(node * ranks.ranks_per_node, (node + 1) * ranks.ranks_per_node)
        there = slice(planned * ranks.ranks_per_node, (planned + 1) * ranks.ranks_per_node)
        for rank, planned_rank in _pairs(common_RR[here, there]):
            become[here.start + rank] = there.start + planned_rank
    return become


def _has(row_RS: IntArray) -> IntArray:
    """[R, E]: 1 where the rank holds the expert."""
    has_RE = np.zeros((len(row_RS), int(row_RS.max()) + 2), dtype=np.int64)
    has_RE[np.arange(len(row_RS))[:, None], row_RS] = 1
    return has_RE[:, :-1]  # -1 went last


def _pairs(common: IntArray) -> list[tuple[int, int]]:
    """Rows with columns, those with the most in common first."""
    pairs, common = [], common.copy()
    for _ in common:
        row, column = divmod(int(common.argmax()), common.shape[1])
        pairs.append((row, column))
        common[row], common[:, column] = -1, -1
    return pairs


def _fill(row_RS: IntArray, score_E: FloatArray, ranks: Ranks) -> None:
    """Slots that are left over get copies of the experts with the highest score per copy, each on a
    node that has none, or of experts that all nodes have."""
    copies_E = np.bincount(row_RS[row_RS >= 0], minlength=len(score_E))
    by_node = row_RS.reshape(ranks.num_nodes, -1)
    for position, slot in np.argwhere(row_RS[ranks.striped] < 0).tolist():
        rank = int(ranks.striped[position])
        missing_E = np.ones(len(score_E) + 1, dtype=bool)
        missing_E[by_node[rank // ranks.ranks_per_node]] = False
        missing_E[:-1] |= copies_E >= ranks.num_nodes
        missing_E[row_RS[rank]] = False
        if missing_E[:-1].any():
            expert = int(np.where(missing_E[:-1], score_E / copies_E, -1.0).argmax())
            row_RS[rank, slot] = expert
            copies_E[expert] += 1
