"""Loads cut so that every rank carries its mean exactly, for any load.

Theorem: m items whose loads add up to k * mean go onto k ranks of S slots, each exactly full, with
S - 1 items cut at most, whenever m <= (S - 1) * k + 1. Sort the items. Of S consecutive ones, the
first S - 1 alone and all S together give two sums; the intervals between these sums overlap from one
window to the next and cover the mean, or else the S - 1 smallest items are too much already and
fewer will do. Either way some window fills a rank with whole items and a part of the last one. What
is left of it goes back: m has shrunk by S - 1 (or everything left is larger than a rank), k by one,
and the condition still holds.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Sequence

Item = tuple[float, int]


def exact_cut(
    load: Sequence[float], capacities: Sequence[float], slots_per_rank: int
) -> list[list[int]]:
    """The experts of each rank. capacities: what each rank should carry, adding up to all loads.

    Exact for equal capacities; for unequal ones, or with more experts than the theorem allows, each
    rank in turn, the largest first, comes as near as a window can.
    """
    items: list[Item] = sorted((amount, expert) for expert, amount in enumerate(load))
    bins: list[list[int]] = [[] for _ in capacities]
    by_capacity = sorted(range(len(capacities)), key=lambda rank: (-capacities[rank], rank))
    for done, rank in enumerate(by_capacity):
        ranks_left = len(capacities) - done - 1
        if not ranks_left or not items:
            bins[rank] = [expert for _, expert in items]
            break
        whole = max(len(items) - slots_per_rank * ranks_left, 0)  # as many must leave now
        taken, rest = _window(items, capacities[rank], slots_per_rank, whole)
        bins[rank] = [expert for _, expert in taken]
        if rest is not None:
            insort(items, rest)
    return bins


def _window(
    items: list[Item], capacity: float, slots: int, at_least: int
) -> tuple[list[Item], Item | None]:
    """Takes consecutive items out that fill `capacity`: (items, what is left of the last one)."""
    size = min(slots, len(items))
    total = sum(amount for amount, _ in items[: size - 1])
    if total > capacity and at_least < size:  # even the smallest are too much
        size, total = 0, 0.0
        while size < len(items) and total + items[size][0] < capacity:
            total += items[size][0]
            size += 1
        size, start = max(size + 1, at_least), 0
    else:
        start, last = 0, len(items) - size
        while start < last and total + items[start + size - 1][0] < capacity:
            total += items[start + size - 1][0] - items[start][0]
            start += 1
    taken = items[start : start + size]
    del items[start : start + size]
    total = sum(amount for amount, _ in taken[:-1])
    amount, expert = taken[-1]
    rest = amount - (capacity - total)
    if rest > 1e-12 * capacity and at_least < len(taken):
        return taken, (rest, expert)
    return taken, None
