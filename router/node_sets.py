"""Which nodes hold copies of each expert, so that tokens visit few nodes and nodes stay even.

A local search from a greedy start. Sampled tokens are bits of big integers: chosen[e] has a bit for
each token that chose expert e, so that a few dozen ors and bit counts say how many nodes all tokens
visit. A token visits the nodes of the experts that only one node has; copies of other experts are
free on those and on its own node, and cost a visit of their own elsewhere.

N nodes, E logical experts; a node set is a sorted tuple of nodes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

NodeSet = tuple[int, ...]

_SPILL = 0.6  # visits for each (token, expert) pair that has to leave its node to even the load
_OVER = 100.0  # the same for pairs that no other node could take
_EVEN = 1.02  # load of a node if copies share alike, times the mean, that costs nothing
_ALONE = 0.85  # load that only this node can take, times the mean, that costs nothing
_LARGEST = 0.85  # of a rank's mean load: what one copy should have at most
_TRIALS = 30_000  # of changes, at 64 experts about 30 us each


@dataclass(frozen=True, kw_only=True)
class Demand:
    """load: each expert's part of all pairs (sum 1). chosen: bits of the sampled tokens that chose
    it. pairs_per_token: experts per token. weight: of node visits against uneven nodes.
    """

    load: Sequence[float]
    chosen: Sequence[int]
    num_tokens: int
    pairs_per_token: float
    num_nodes: int
    ranks_per_node: int
    slots_per_rank: int
    weight: float = 1.0

    @property
    def slots_per_node(self) -> int:
        return self.ranks_per_node * self.slots_per_rank

    def copies_on_node(self, expert: int, nodes: int) -> int:
        """Copies that one of `nodes` nodes needs, on different ranks, so that none is too large."""
        part = self.load[expert] * self.num_nodes * self.ranks_per_node / nodes
        return min(self.ranks_per_node, 1 + int(part / _LARGEST))


def find_node_sets(demand: Demand, seed: int = 0) -> list[NodeSet]:
    """The node set of each expert. Deterministic; ends at a local optimum or after _TRIALS."""
    search = _Search(demand)
    search.descend(np.random.default_rng(seed))
    return search.sets


class _Search:
    def __init__(self, demand: Demand) -> None:
        self.demand = demand
        nodes = range(1, demand.num_nodes + 1)
        self.copies = [
            [0, *[demand.copies_on_node(e, n) for n in nodes]] for e in range(len(demand.load))
        ]
        self.sets = self._start()

    def _start(self) -> list[NodeSet]:
        """The most loaded experts on every node, others where the tokens are that choose them."""
        demand, num_nodes = self.demand, self.demand.num_nodes
        room, load = [demand.slots_per_node] * num_nodes, [0.0] * num_nodes
        visits = [0] * num_nodes
        sets: list[NodeSet] = [()] * len(demand.load)
        by_load = sorted(range(len(sets)), key=lambda e: (-demand.load[e], e))
        waiting = sum(copies[1] for copies in self.copies)
        for expert in by_load:
            alone, everywhere = self.copies[expert][1], self.copies[expert][num_nodes]
            waiting -= alone
            nodes = list(range(num_nodes))
            if sum(room) - num_nodes * everywhere < waiting or min(room) < everywhere:
                held = [sum(n in nodes for nodes in sets) for n in nodes]
                nodes = [self._best_node(expert, alone, room, load, visits, held)]
            sets[expert] = tuple(nodes)
            for node in nodes:
                room[node] -= self.copies[expert][len(nodes)]
                load[node] += demand.load[expert] / len(nodes)
                visits[node] |= demand.chosen[expert] if len(nodes) == 1 else 0
        return sets

    def _best_node(
        self,
        expert: int,
        copies: int,
        room: list[int],
        load: list[float],
        visits: list[int],
        held: list[int],
    ) -> int:
        demand = self.demand
        nodes = [n for n in range(demand.num_nodes) if room[n] >= copies]
        most = _EVEN / demand.num_nodes - demand.load[expert]
        even = [n for n in nodes if load[n] <= most]
        if even:
            return max(even, key=lambda n: ((visits[n] & demand.chosen[expert]).bit_count(), -n))
        # Where large experts leave no room for all their copies, one copy of each still fits.
        return min(nodes or range(demand.num_nodes), key=lambda n: (held[n], load[n], n))

    def descend(self, rng: np.random.Generator) -> None:
        """Take every change that lowers the cost, in random order, until none does."""
        sets, best, trials, found = self.sets, self.cost(), 0, True
        while found:
            found = False
            changes = list(self._changes())
            for idx in rng.permutation(len(changes)).tolist():
                new = self._changed(*changes[idx])
                if new is None:
                    continue
                first, second, new_first, new_second = new
                old_first, old_second = sets[first], sets[second]
                sets[first], sets[second] = new_first, new_second
                cost, trials = self.cost(), trials + 1
                if cost < best - 1e-9:
                    best, found = cost, True
                else:
                    sets[first], sets[second] = old_first, old_second
                if trials == _TRIALS:
                    return

    def _changes(self) -> Iterator[tuple[int, int, int]]:
        """(expert, other, node): swap their sets (node -1); or give `node` a copy of `other`, in
        the place of one of `expert` unless they are the same."""
        experts = range(len(self.sets))
        for expert in experts:
            for other in range(expert + 1, len(self.sets)):
                yield expert, other, -1
        for node in range(self.demand.num_nodes):
            for expert in experts:
                for other in experts:
                    if other == expert or len(self.sets[expert]) > 1:
                        yield expert, other, node

    def _changed(
        self, expert: int, other: int, node: int
    ) -> tuple[int, int, NodeSet, NodeSet] | None:
        """The two experts and their new sets; None if there is no such change (any more)."""
        had, had_other = self.sets[expert], self.sets[other]
        if node < 0:
            return None if had == had_other else (expert, other, had_other, had)
        if node in had_other:
            return None
        more = tuple(sorted((*had_other, node)))
        if other == expert:
            return expert, other, more, more
        if node not in had or len(had) == 1:
            return None
        return expert, other, tuple(n for n in had if n != node), more

    def cost(self) -> float:
        """Remote nodes that a token visits, and what it takes to even nodes; inf: too few slots."""
        demand, num_nodes = self.demand, self.demand.num_nodes
        visits, used, several = [0] * num_nodes, [0] * num_nodes, []
        even, alone = [0.0] * num_nodes, [0.0] * num_nodes
        for expert, nodes in enumerate(self.sets):
            part, copies = demand.load[expert] / len(nodes), self.copies[expert][len(nodes)]
            for node in nodes:
                even[node] += part
                used[node] += copies
            if len(nodes) == 1:
                visits[nodes[0]] |= demand.chosen[expert]
                alone[nodes[0]] += part
            else:
                several.append((demand.chosen[expert], nodes))
        crossing = sum([v.bit_count() for v in visits]) * (num_nodes - 1)
        for chosen, nodes in several:
            near = 0
            for node in nodes:
                near |= visits[node]
            crossing += (chosen & ~near).bit_count() * (num_nodes - len(nodes))
        spill = sum([max(0.0, part * num_nodes - _EVEN) for part in even]) * _SPILL
        over = sum([max(0.0, part * num_nodes - _ALONE) for part in alone])
        if max(used) > demand.slots_per_node:
            return math.inf
        return demand.weight * crossing / (
            num_nodes * demand.num_tokens
        ) + demand.pairs_per_token / num_nodes * (spill + _OVER * over)
