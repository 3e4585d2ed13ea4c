"""Where the experts of the serving cluster are, and how many tokens each slot gets in a step.

Steps are drawn in pools, one for each size (to a fifth) that occurs, and dealt out in turn, a few
rounds of each pool before the next: their pairs divide over copies all at once, and again layer by
layer where the placement changes. A step of another size within the fifth gets the same proportions.

L expert layers, E logical experts, S slots of all ranks, B steps of a pool, R ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from router.placement import Placement
from simulations.balance.divisions import Division
from simulations.serving.demand import Demand
from simulations.serving.rebalance import Rebalancing
from simulations.serving.record import Event

POOL_STEPS, ROUNDS = 16, 4
SIZES_PER_DOUBLING = 4
FloatArray = NDArray[np.float32]


class ServedExperts:
    """`advance` before each step, then `slot_tokens` of it."""

    def __init__(
        self, demand: Demand, rebalancing: Rebalancing, division: Division, experts_per_token: int
    ) -> None:
        self.events: list[Event] = []
        self._demand = demand
        self._rebalancing = rebalancing
        self._division = division
        self._per_token = experts_per_token
        self._lost: frozenset[int] = frozenset()
        self._step = 0
        self._pools: dict[int, _Pool] = {}
        self._counts_LE = np.zeros((demand.num_layers, demand.num_experts))
        self._use(rebalancing.placement, range(demand.num_layers))

    @property
    def slowdown(self) -> float:
        """By how much steps take longer because experts are on their way."""
        return self._rebalancing.slowdown

    def advance(self, now_s: float) -> float:
        """Experts that arrived are in force; returns seconds for which all wait for others."""
        if self._demand.advance(self._step):
            self._pools.clear()
        self._step += 1
        if self._lost:
            return 0.0
        change = self._rebalancing.advance(now_s, self._counts_LE)
        if change.event:
            self.events.append(change.event)
        if change.layers:
            self._use(self._rebalancing.placement, change.layers)
        return change.pause_s

    def slot_tokens(self, num_tokens: int) -> FloatArray:
        """[L, S]: (token, expert) pairs of each slot in a step with so many tokens."""
        size = round(SIZES_PER_DOUBLING * math.log2(num_tokens))
        pool = self._pools.get(size)
        if pool is None:
            tokens = 2 ** (size / SIZES_PER_DOUBLING)
            pool = self._pools[size] = _Pool(self._demand, round(tokens * self._per_token))
        counts_LE, slot_LS = pool.next(self._division)
        scale = num_tokens * self._per_token / pool.num_pairs
        self._counts_LE += counts_LE * scale
        return slot_LS * np.float32(scale)

    def set_lost(self, ranks: Iterable[int]) -> bool:
        """These ranks are lost; False if an expert has no copy on another, and nothing can run."""
        self._lost = frozenset(ranks)
        self._rebalancing.abandon()
        placement = self._rebalancing.placement
        try:
            self._use(_without(placement, self._lost), range(placement.num_layers))
        except ValueError:
            return False
        return True

    def _use(self, placement: Placement, changed: Iterable[int]) -> None:
        layers = tuple(changed)
        self._division.follow(placement, layers)
        for pool in self._pools.values():
            pool.stale.update(layers)


class _Pool:
    """Steps of one size."""

    def __init__(self, demand: Demand, num_pairs: int) -> None:
        self.num_pairs = num_pairs
        self.stale: set[int] = set()
        """Layers to divide anew, before the next step."""
        self._demand = demand
        self._dealt = 0

    def next(self, division: Division) -> tuple[NDArray[np.int64], FloatArray]:
        """(pairs of each expert [L, E], of each slot [L, S])."""
        pool, deal = divmod(self._dealt, POOL_STEPS * ROUNDS)
        step = deal % POOL_STEPS
        if deal == 0:
            self._counts_BLE = self._demand.draw(self.num_pairs, POOL_STEPS, pool)
            self.stale.update(range(self._demand.num_layers))
        if len(self.stale) == self._demand.num_layers:
            self._slot_BLS = division.slots(self._counts_BLE[:, None]).astype(np.float32)
        else:
            for layer in self.stale:
                one = slice(layer, layer + 1)
                self._slot_BLS[:, one] = division.slots(self._counts_BLE[:, None, one], one)
        self.stale.clear()
        self._dealt += 1
        return self._counts_BLE[step], self._slot_BLS[step]


def _without(placement: Placement, lost: frozenset[int]) -> Placement:
    """The slots of lost ranks empty; ValueError where an expert then has no copy."""
    if not lost:
        return placement
    rows_LS = placement.physical_to_logical.copy()
    for rank in lost:
        slots = placement.slots_of_rank(rank)
        rows_LS[:, slots.start : slots.stop] = -1
    return placement.with_layers(dict(enumerate(rows_LS)), epoch=placement.epoch)
