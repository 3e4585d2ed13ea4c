"""One layer's plan for the usual case of a spare slot or more per rank: hubs in a ring.

The experts with the most load, the *hubs*, are laid end to end on a line as long as their load, and
so is the room that the other experts, the *singles*, leave on each rank. Where a hub's stretch meets
a rank's, the rank gets a copy and that part of the hub's load, its *piece*. A hub thus spans
consecutive ranks, like a star, and shares its last rank with the next hub; the last hub ends where
the first began. This cuts all loads exactly, and it is robust: when a batch differs from the plan,
tokens move along the ring, and every rank can give away or take on about a piece. So pieces should
be large and alike: as many hubs as still get two pieces of the mean size, pieces apportioned to them
by load, and singles packed so that they leave each rank the room of its pieces.

Consecutive ranks of the ring are on different nodes, which puts a hub's copies on as many nodes as
it can be on.

E experts, R ranks, H hubs, P pieces, positions 0, 1, ... along the ring (several rounds of all ranks
when there are that many spare slots).
"""

from __future__ import annotations

from bisect import bisect_left
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from router.placement import IntArray

FloatArray = NDArray[np.float64]


class RingPlan(NamedTuple):
    """experts_of_rank: hubs and singles of each rank. margin: the least piece, or all pieces of a
    rank, relative to the ranks' capacity; at most 0 if the loads cannot be cut this way."""

    experts_of_rank: list[list[int]]
    margin: float


class _Pieces(NamedTuple):
    hub_P: IntArray
    position_P: IntArray
    load_P: FloatArray
    last_position_H: IntArray
    closed: bool


def hub_ring(
    load_E: FloatArray,
    score_E: FloatArray,
    capacity_R: FloatArray,
    slots_per_rank: int,
    ranks_by_position: IntArray,
    heavy: float,
) -> RingPlan:
    """Plan a layer whose load is capacity_R.sum(). score_E: who should be a hub, highest first; those
    above `heavy` times a rank's capacity become hubs in any case, as they are hard to pack."""
    num_experts, num_ranks = len(load_E), len(capacity_R)
    spare = num_ranks * slots_per_rank - num_experts
    order = np.argsort(-score_E, kind="stable")
    rounds = min(spare // num_ranks, slots_per_rank // 2)
    positions = rounds * num_ranks if rounds else min(num_ranks, spare + 1)
    capacity = capacity_R[ranks_by_position]
    num_hubs = _num_hubs(load_E[order], score_E[order], positions, heavy * capacity_R.mean())
    hubs = _riffle(order[: min(num_hubs, positions if rounds else max(1, positions - 1))])
    pieces = _apportion(load_E[hubs], np.resize(capacity, positions), num_ranks, closed=rounds > 0)
    rank_P = pieces.position_P % num_ranks
    room = np.bincount(rank_P, pieces.load_P, num_ranks)
    free = slots_per_rank - np.bincount(rank_P, minlength=num_ranks)

    singles = order[len(hubs) :]
    singles = singles[np.argsort(-load_E[singles], kind="stable")]
    groups, load_of_group = _pack(load_E[singles], capacity - room, free)
    dealt, error = _arrange(load_of_group, capacity - room, free)

    experts_of_rank: list[list[int]] = [[] for _ in range(num_ranks)]
    for hub, position in zip(hubs[pieces.hub_P].tolist(), rank_P.tolist(), strict=True):
        experts_of_rank[ranks_by_position[position]].append(hub)
    names = [*singles.tolist(), -1]
    for rank, group in zip(ranks_by_position.tolist(), groups[dealt].tolist(), strict=True):
        experts_of_rank[rank] += [names[item] for item in group if item >= 0]
    return RingPlan(experts_of_rank, _margin(pieces, error) / float(capacity_R.mean()))


def _num_hubs(load: FloatArray, score: FloatArray, positions: int, heavy: float) -> int:
    """The most experts, in this order, whose score is two pieces of the mean size, or heavy."""
    count = np.arange(1, len(load) + 1)
    fit = (score >= 2 * np.cumsum(load) / (positions + count)) | (score > heavy)
    return len(load) if fit.all() else max(1, int(fit.argmin()))


def _riffle(hubs: IntArray) -> IntArray:
    """Large ones next to small ones: two small pieces on a rank would want too much of its singles."""
    mixed, half = np.empty_like(hubs), (len(hubs) + 1) // 2
    mixed[0::2], mixed[1::2] = hubs[:half], hubs[half:]
    return mixed


def _apportion(load_H: FloatArray, capacity: FloatArray, num_ranks: int, closed: bool) -> _Pieces:
    """Two pieces for each hub, the others by load (Webster's method), at most one per rank."""
    num_hubs, positions = len(load_H), len(capacity)
    most = min(num_ranks, positions)
    least = min(2, most)
    wanted = positions + num_hubs - (0 if closed and num_hubs > 1 else 1)
    copies_H = np.full(num_hubs, least)
    more = min(wanted, most * num_hubs) - least * num_hubs
    if more > 0:
        divisor = least + np.arange(min(more, most - least)) + 0.5
        quotient = (load_H[:, None] / divisor).ravel()
        best = np.argsort(-quotient, kind="stable")[:more]
        copies_H += np.bincount(best // len(divisor), minlength=num_hubs)
    hub_P = np.repeat(np.arange(num_hubs), copies_H)
    first_H = np.cumsum(copies_H - 1) - (copies_H - 1)
    position_P = (np.arange(len(hub_P)) - hub_P) % positions  # neighbours share a position
    size_P = capacity[position_P]
    return _Pieces(
        hub_P,
        position_P,
        (load_H / np.bincount(hub_P, size_P))[hub_P] * size_P,
        first_H + copies_H - 1,
        closed=copies_H.sum() == positions + num_hubs,
    )


def _pack(load: FloatArray, target_R: FloatArray, free_R: IntArray) -> tuple[IntArray, FloatArray]:
    """Items (descending load) into ranks of `free_R` slots each, each rank near its target.

    In every round each rank with a slot left gets one item, the heaviest where the most is missing
    per slot; then pairs of ranks, one above its target and one below, swap the two items that
    bring both nearest. Returns (items of each rank, -1 = none; their load).
    """
    num_ranks, most = len(target_R), max(1, int(free_R.max(initial=0)))
    item = np.full((num_ranks, most), -1)
    missing_R = target_R.copy()
    first = 0
    for turn in range(most):
        ranks = np.flatnonzero(free_R > turn)
        need = missing_R[ranks] / (free_R[ranks] - turn)
        ranks = ranks[np.argsort(-need, kind="stable")][: len(load) - first]
        item[ranks, turn] = np.arange(first, first + len(ranks))
        missing_R[ranks] -= load[first : first + len(ranks)]
        first += len(ranks)
    _swap(item, np.append(load, 0.0), missing_R)
    return item, target_R - missing_R


def _swap(item: IntArray, load: FloatArray, missing_R: FloatArray, turns: int = 4) -> None:
    half, slots = len(missing_R) // 2, item.shape[1]
    pairs = np.arange(half)
    for _ in range(turns):
        order = np.argsort(missing_R, kind="stable")
        over, under = order[:half], order[: -half - 1 : -1]
        wanted = (missing_R[under] - missing_R[over]) / 2
        given = load[item[over]][:, :, None] - load[item[under]][:, None, :]
        both = (item[over] >= 0)[:, :, None] & (item[under] >= 0)[:, None, :]
        miss = np.where(both, np.abs(given - wanted[:, None, None]), np.inf).reshape(half, slots**2)
        best = miss.argmin(axis=1)
        better = miss[pairs, best] < wanted
        over, under, best = over[better], under[better], best[better]
        i, j = best // slots, best % slots
        item[over, i], item[under, j] = item[under, j], item[over, i]
        moved = load[item[under, j]] - load[item[over, i]]
        missing_R[over] += moved
        missing_R[under] -= moved


def _arrange(
    load_R: FloatArray, target_R: FloatArray, free_R: IntArray
) -> tuple[list[int], FloatArray]:
    """Deal groups of singles out along the ring so that what they miss of the targets does not add
    up. Returns (which group each position gets, its target - the group's load)."""
    by_size: dict[int, list[tuple[float, int]]] = {}
    for size, load, group in sorted(
        zip(free_R.tolist(), load_R.tolist(), range(len(load_R)), strict=True)
    ):
        by_size.setdefault(size, []).append((load, group))
    order, ahead = [], 0.0
    for size, target in zip(free_R.tolist(), target_R.tolist(), strict=True):
        alike, wanted = by_size[size], target + ahead
        place = bisect_left(alike, (wanted, 0))
        if place == len(alike) or (
            place > 0 and wanted - alike[place - 1][0] < alike[place][0] - wanted
        ):
            place -= 1
        load, group = alike.pop(place)
        order.append(group)
        ahead = wanted - load
    return order, target_R - load_R[order]


def _margin(pieces: _Pieces, error_R: FloatArray) -> float:
    """The least piece at a shared rank. `error_R`: room that singles leave beyond the pieces."""
    num_positions = int(pieces.position_P.max()) + 1
    rounds = max(1, num_positions // len(error_R))
    room = np.bincount(pieces.position_P, pieces.load_P).astype(np.float64)
    room += np.resize(error_R, num_positions) / rounds
    ranks_end, hubs_end = np.cumsum(room), np.cumsum(np.bincount(pieces.hub_P, pieces.load_P))
    shared = pieces.last_position_H[: None if pieces.closed else -1] % num_positions
    if not len(shared):
        return float(room.min())
    before = hubs_end[: len(shared)] - (ranks_end - room)[shared]
    if pieces.closed:
        before[-1] = hubs_end[-1] - ranks_end[-1]
    after = room[shared] - before
    # The whole line of hubs may be shifted along a closed ring.
    shift = (after.min() - before.min()) / 2 if pieces.closed else 0.0
    return float(min(before.min() + shift, after.min() - shift, room.min()))
