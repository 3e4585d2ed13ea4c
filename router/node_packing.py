"""Which rank of its node holds each copy, so that batches can be divided evenly over ranks.

Ranks that share an expert can pass tokens to each other, up to what that expert has. Seen as a
network of springs, or resistors, whose conductances are those loads, evening out differences d of
the ranks' loads takes the energy d' inv(L) d, with L the network's Laplacian. Expected over batches
in which each rank is off by an independent amount of standard deviation _NOISE, that is

    d' inv(L) d + _NOISE**2 trace(inv(L)),  d: the loads if copies shared alike

which is low where ranks are alike on average, and where no group of them is linked weakly to the rest.

R ranks, E logical experts, A those with several copies, B candidates.
"""

from __future__ import annotations

from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from router.node_sets import Demand, NodeSet

FloatArray = NDArray[np.float64]

_NOISE = 0.1  # of a rank's mean load
_GROUND = 0.02  # a small conductance to elsewhere, without which L has no inverse
_PASSES = 4


def pack(sets: list[NodeSet], demand: Demand) -> list[int]:
    """The expert in each slot of all ranks, -1 = empty, for the node set of each expert."""
    ranks = [rank for node in range(demand.num_nodes) for rank in _fill_node(node, sets, demand)]
    network = _Network(ranks, demand)
    for _ in range(_PASSES):
        swapped = [
            network.swap(first + a, first + b)
            for first in range(0, len(ranks), demand.ranks_per_node)
            for a, b in combinations(range(demand.ranks_per_node), 2)
        ]
        if not any(swapped):
            break
    return [expert for rank in ranks for expert in rank]


def _fill_node(node: int, sets: list[NodeSet], demand: Demand) -> list[list[int]]:
    """Largest first, each to the rank with the least; one copy of an expert before any second."""
    copies = [
        (copy, -demand.load[expert] / (len(nodes) * on_node), expert)
        for expert, nodes in enumerate(sets)
        if node in nodes
        for on_node in [demand.copies_on_node(expert, len(nodes))]
        for copy in range(on_node)
    ]
    ranks: list[list[int]] = [[] for _ in range(demand.ranks_per_node)]
    load = [0.0] * demand.ranks_per_node
    for _, part, expert in sorted(copies):
        room = [
            r
            for r, rank in enumerate(ranks)
            if len(rank) < demand.slots_per_rank and expert not in rank
        ]
        if room:
            rank = min(room, key=lambda r: load[r])
            ranks[rank].append(expert)
            load[rank] -= part
    return [rank + [-1] * (demand.slots_per_rank - len(rank)) for rank in ranks]


class _Network:
    """The ranks and the experts they share; `swap` exchanges entries of `ranks` in place."""

    def __init__(self, ranks: list[list[int]], demand: Demand) -> None:
        self.ranks = ranks
        self.held_RE = np.zeros((len(ranks), len(demand.load) + 1))
        for rank, experts in enumerate(ranks):
            self.held_RE[rank, experts] = 1.0
        self.held_RE[:, -1] = 0.0  # empty slots
        self.copies_E = self.held_RE.sum(axis=0)
        load_E = np.append(demand.load, 0.0) * len(ranks)
        self.load_E = load_E / np.maximum(self.copies_E, 1)
        self.linking = np.flatnonzero(self.copies_E > 1)
        self.energy = float(self._energies(self.held_RE[None])[0])

    def swap(self, first: int, second: int) -> bool:
        """Make the exchange of two slots that lowers the energy most, if any does."""
        mine, other = self.ranks[first], self.ranks[second]
        legal = [
            (i, j)
            for i, a in enumerate(mine)
            for j, b in enumerate(other)
            if a != b and (a < 0 or a not in other) and (b < 0 or b not in mine)
        ]
        if not legal:
            return False
        held_BRE = np.repeat(self.held_RE[None], len(legal), axis=0)
        for held_RE, (i, j) in zip(held_BRE, legal, strict=True):
            held_RE[[first, second], mine[i]] = 0.0, 1.0
            held_RE[[first, second], other[j]] = 1.0, 0.0
        held_BRE[:, :, -1] = 0.0
        energies_B = self._energies(held_BRE)
        best = int(energies_B.argmin())
        if energies_B[best] >= self.energy - 1e-9:
            return False
        i, j = legal[best]
        mine[i], other[j] = other[j], mine[i]
        self.held_RE, self.energy = held_BRE[best], float(energies_B[best])
        return True

    def _energies(self, held_BRE: FloatArray) -> FloatArray:
        """Each expert links all its ranks with each other: the sum of complete graphs."""
        shared_BRA, copies_A = held_BRE[:, :, self.linking], self.copies_E[self.linking]
        conduct_BRA = shared_BRA * (2 * self.load_E[self.linking] / copies_A)
        laplacian_BRR = -conduct_BRA @ shared_BRA.transpose(0, 2, 1)
        ranks = np.arange(held_BRE.shape[1])
        laplacian_BRR[:, ranks, ranks] += conduct_BRA @ copies_A + _GROUND
        inverse_BRR = np.linalg.inv(laplacian_BRR)
        off_BR = held_BRE @ self.load_E
        off_BR -= off_BR.mean(axis=1, keepdims=True)
        uneven_B = np.einsum("br,brs,bs->b", off_BR, inverse_BRR, off_BR)
        energies: FloatArray = uneven_B + _NOISE**2 * np.einsum("brr->b", inverse_BRR)
        return energies
