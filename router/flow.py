"""Tokens of experts that several ranks hold, divided so that no rank exceeds its room.

A flow from experts to ranks along edges: one per (expert, rank that holds it). What an edge gets is
decided in an order that depends on the graph alone. An expert or a rank with one edge left is a
leaf, and giving that edge all it can take is optimal; so on a tree one pass is a maximum flow. Where
only cycles are left, an edge gets its expert's tokens in proportion to the ranks' room, which is a
guess; augmenting paths then correct what the guesses cost.

All in plain integers: graphs are small (a few hundred edges), and every rank must find the same.
"""

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from typing import NamedTuple


class Bottleneck(NamedTuple):
    """Experts that only these ranks hold, and whose tokens these ranks have no room for."""

    experts: list[int]
    ranks: list[int]


class Flow:
    """Edge i joins expert experts[i] and rank ranks[i], both numbered from 0; no two are alike."""

    def __init__(
        self, experts: Sequence[int], ranks: Sequence[int], *, num_experts: int, num_ranks: int
    ) -> None:
        self.experts, self.ranks = experts, ranks
        self.edges_of_expert: list[list[int]] = [[] for _ in range(num_experts)]
        self.edges_of_rank: list[list[int]] = [[] for _ in range(num_ranks)]
        for edge, (expert, rank) in enumerate(zip(experts, ranks, strict=True)):
            self.edges_of_expert[expert].append(edge)
            self.edges_of_rank[rank].append(edge)
        self._order = self._peel()

    def fill(
        self,
        tokens: Sequence[int],
        room: Sequence[int],
        start: Sequence[int] = (),
        closed: AbstractSet[int] = frozenset(),
    ) -> tuple[list[int], list[Bottleneck]]:
        """Tokens on each edge, and why some were left over, if any were.

        start: a flow within tokens and room to begin with, nothing by default.
        closed: edges that carry nothing. A leaf stays one without them.
        """
        left, room = list(tokens), list(room)
        flow = list(start) or [0] * len(self.experts)
        for edge, amount in enumerate(start):
            left[self.experts[edge]] -= amount
            room[self.ranks[edge]] -= amount
        for edge, expert, rank, rivals in self._order:
            if edge in closed:
                continue
            amount = left[expert]
            if rivals:
                amount = amount * room[rank] // max(1, sum([room[r] for r in rivals]))
            if amount > room[rank]:
                amount = room[rank]
            flow[edge] += amount
            left[expert] -= amount
            room[rank] -= amount
        too_much = []
        for expert in range(len(left)):
            while left[expert]:
                bottleneck = self._augment(expert, left, room, flow, closed)
                if bottleneck is not None:
                    too_much.append(bottleneck)
                    break
        return flow, too_much

    def components(self) -> tuple[list[int], list[int]]:
        """The connected component of each expert and of each rank, numbered from 0."""
        of_expert, of_rank = [-1] * len(self.edges_of_expert), [-1] * len(self.edges_of_rank)
        count = 0
        for start in range(len(of_rank)):
            if of_rank[start] >= 0:
                continue
            of_rank[start], waiting = count, [start]
            for rank in waiting:
                for expert in [self.experts[edge] for edge in self.edges_of_rank[rank]]:
                    if of_expert[expert] < 0:
                        of_expert[expert] = count
                        new = [self.ranks[edge] for edge in self.edges_of_expert[expert]]
                        new = [r for r in new if of_rank[r] < 0]
                        waiting += new
                        for r in new:
                            of_rank[r] = count
            count += 1
        return of_expert, of_rank

    def _peel(self) -> list[tuple[int, int, int, list[int]]]:
        """(edge, expert, rank, rivals): all edges in order; rivals: the ranks of a guess."""
        experts, ranks = self.edges_of_expert, self.edges_of_rank
        at_expert = [set(edges) for edges in experts]
        at_rank = [set(edges) for edges in ranks]
        remaining = set(range(len(self.experts)))
        order = []
        leaves = [min(edges) for edges in (*at_rank, *at_expert) if len(edges) == 1]
        while remaining:
            rivals: list[int] = []
            if leaves:
                edge = leaves.pop()
                if edge not in remaining:
                    continue
            else:
                edge = max(remaining, key=lambda e: (len(at_rank[self.ranks[e]]), -e))
                rivals = sorted(self.ranks[e] for e in at_expert[self.experts[edge]])
            expert, rank = self.experts[edge], self.ranks[edge]
            order.append((edge, expert, rank, rivals))
            remaining.discard(edge)
            for side in (at_expert[expert], at_rank[rank]):
                side.discard(edge)
                if len(side) == 1:
                    leaves.append(min(side))
        return order

    def _augment(
        self,
        start: int,
        left: list[int],
        room: list[int],
        flow: list[int],
        closed: AbstractSet[int],
    ) -> Bottleneck | None:
        """Move tokens along a shortest path from expert `start` to a rank with room."""
        left_by = {start: -1}  # expert: the edge whose tokens it can move elsewhere
        entered_by: dict[int, int] = {}
        waiting = [start]
        for expert in waiting:
            for edge in self.edges_of_expert[expert]:
                rank = self.ranks[edge]
                if rank in entered_by or edge in closed:
                    continue
                entered_by[rank] = edge
                if room[rank] > 0:
                    self._push(rank, entered_by, left_by, left, room, flow)
                    return None
                for other in self.edges_of_rank[rank]:
                    neighbour = self.experts[other]
                    if flow[other] > 0 and neighbour not in left_by:
                        left_by[neighbour] = other
                        waiting.append(neighbour)
        return Bottleneck(waiting, list(entered_by))

    def _push(
        self,
        rank: int,
        entered_by: dict[int, int],
        left_by: dict[int, int],
        left: list[int],
        room: list[int],
        flow: list[int],
    ) -> None:
        last, gains, losses = rank, [], []
        while True:
            gains.append(entered_by[rank])
            expert = self.experts[entered_by[rank]]
            source = left_by[expert]
            if source < 0:
                break
            losses.append(source)
            rank = self.ranks[source]
        amount = min(left[expert], room[last], *[flow[edge] for edge in losses])
        for edge in gains:
            flow[edge] += amount
        for edge in losses:
            flow[edge] -= amount
        left[expert] -= amount
        room[last] -= amount
