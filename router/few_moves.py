"""A layer's placement improved by moving as few experts as possible.

Tokens divide over the present copies as a flow from experts to ranks (flow.py). Where it cannot
place all tokens below the target, a set of ranks has too many of experts that only it holds. One of
these experts then gets a copy on a rank outside that has room, or can make some, in a slot that is
empty or whose expert has other copies that can take over. Of a few such moves that look best the one
is made that leaves the least load above the target, until none is left.

E experts, R ranks. Loads are integers.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

from router.flow import Flow

_FEW, _MANY = 6, 60  # moves tried where there is a choice, and where none of those few is good
_AS_HOPED = 0.8  # a move that brings this part of what it should is not compared with others
_WORTH = 1e-4  # a move must bring at least this part of a rank's mean load below the target


class _Division(NamedTuple):
    """excess: load above the ranks' caps. crowded: the experts and ranks of the bottleneck
    with most above the caps per rank; too_much: how much that is in all."""

    excess: int
    room_R: list[int]
    flow: dict[tuple[int, int], int]
    crowded: tuple[list[int], list[int]]
    too_much: int


class _Change(NamedTuple):
    rank: int
    slot: int
    expert: int


def few_moves(
    slots: list[list[int]], load: Sequence[int], caps: Sequence[int], max_moves: int
) -> tuple[list[list[int]], bool]:
    """slots: the experts of each rank, -1 = empty. caps: what each rank should carry at most.

    Returns (slots after the moves, whether the caps are met).
    """
    division = _divide(slots, load, caps)
    worth = max(1, int(sum(load) / len(caps) * _WORTH))
    moves = 0
    while division.excess:
        enough = max(0, division.excess - worth)
        tried = [(slots, division)]
        for propose, cost, trials in _WAYS:
            if moves + cost > max_moves:
                continue
            for helps, changes in propose(slots, load, division)[:trials]:
                after = _changed(slots, changes)
                tried.append((after, _divide(after, load, caps)))
                if tried[-1][1].excess <= division.excess - _AS_HOPED * helps:
                    break
            after, divided = min(tried, key=lambda t: t[1].excess)
            if divided.excess <= enough:
                break
        else:
            break
        moves += cost
        slots, division = after, divided
    return slots, not division.excess


def _changed(slots: list[list[int]], changes: Sequence[_Change]) -> list[list[int]]:
    changed = list(slots)
    for rank, slot, expert in changes:
        changed[rank] = list(changed[rank])
        changed[rank][slot] = expert
    return changed


def _holders(slots: list[list[int]], num_experts: int) -> list[list[int]]:
    holders: list[list[int]] = [[] for _ in range(num_experts)]
    for rank, experts in enumerate(slots):
        for expert in set(experts):
            if expert >= 0:
                holders[expert].append(rank)
    return holders


def _divide(slots: list[list[int]], load: Sequence[int], caps: Sequence[int]) -> _Division:
    holders = _holders(slots, len(load))
    several = [expert for expert, ranks in enumerate(holders) if len(ranks) > 1]
    room = list(caps)
    for expert, ranks in enumerate(holders):
        if len(ranks) == 1:
            room[ranks[0]] -= load[expert]
    over = [max(0, -r) for r in room]
    edges = [(i, rank) for i, expert in enumerate(several) for rank in holders[expert]]
    graph = Flow(
        [i for i, _ in edges],
        [rank for _, rank in edges],
        num_experts=len(several),
        num_ranks=len(caps),
    )
    tokens = [load[expert] for expert in several]
    amounts, bottlenecks = graph.fill(tokens, [max(0, r) for r in room])
    flow = {}
    for (i, rank), amount in zip(edges, amounts, strict=True):
        flow[several[i], rank] = amount
        room[rank] -= amount
    crowded: tuple[list[int], list[int]] = [], [0]
    too_much = 0
    for index, ranks in bottlenecks:
        chosen = set(index)
        excess = sum([tokens[i] for i in index])
        excess -= sum([a for (i, _), a in zip(edges, amounts, strict=True) if i in chosen])
        if excess * len(crowded[1]) > too_much * len(ranks):
            too_much, crowded = excess, ([several[i] for i in index], ranks)
    for rank, excess in enumerate(over):
        if excess * len(crowded[1]) > too_much:
            too_much, crowded = excess, ([], [rank])
    excess = sum(over) + sum(tokens) - sum(amounts)
    return _Division(excess, [max(0, r) for r in room], flow, crowded, too_much)


def _copies(
    slots: list[list[int]], load: Sequence[int], division: _Division
) -> list[tuple[int, list[_Change]]]:
    """(load it should bring below the target, changes), the best first. One more copy of a crowded expert, outside the crowd."""
    holders = _holders(slots, len(load))
    shared, ranks = division.crowded
    crowd = set(ranks)
    alone = [e for rank in ranks for e in slots[rank] if e >= 0 and len(holders[e]) == 1]
    givers = sorted(chain(shared, alone), key=lambda e: (-load[e], e))[:3]
    room = division.room_R
    found = []
    for rank, experts in enumerate(slots):
        if rank in crowd:
            continue
        for slot, old in enumerate(experts):
            if old < 0:
                gets, used = room[rank], 0
            elif len(holders[old]) > 1:
                used = division.flow[old, rank]
                elsewhere = sum([room[r] for r in holders[old] if r != rank])
                gets = room[rank] + min(used, elsewhere) - max(0, used - elsewhere)
            else:
                continue
            for expert in givers:
                if expert not in experts:
                    helps = min(gets, division.too_much, load[expert])
                    found.append((-helps, used, -load[expert], rank, slot, expert))
    found.sort()
    return [(-minus, [_Change(rank, slot, expert)]) for minus, _, _, rank, slot, expert in found]


def _swaps(
    slots: list[list[int]], load: Sequence[int], division: _Division
) -> list[tuple[int, list[_Change]]]:
    """The same: a single expert of the crowd and a lighter one outside change places."""
    holders = _holders(slots, len(load))
    crowd = set(division.crowded[1])
    singles = [
        (rank, slot, expert)
        for rank, experts in enumerate(slots)
        for slot, expert in enumerate(experts)
        if expert >= 0 and len(holders[expert]) == 1
    ]
    found = []
    for rank, slot, heavy in singles:
        if rank not in crowd:
            continue
        for other_rank, other_slot, light in singles:
            more = load[heavy] - load[light]
            if other_rank not in crowd and more > 0:
                helps = min(division.too_much, more) - max(0, more - division.room_R[other_rank])
                found.append((-helps, rank, slot, other_rank, other_slot, heavy, light))
    found.sort()
    return [
        (-minus, [_Change(rank, slot, light), _Change(other_rank, other_slot, heavy)])
        for minus, rank, slot, other_rank, other_slot, heavy, light in found
    ]


_WAYS = ((_copies, 1, _FEW), (_swaps, 2, _FEW), (_copies, 1, _MANY), (_swaps, 2, _MANY))
"""Moves of how many experts, and how many of them to try, until one is good."""
