"""Experts and the ranks that hold them as rooted trees, opened where there is a cycle."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Edge(NamedTuple):
    number: int
    expert: int
    rank: int


class Branch(NamedTuple):
    """An expert, the rank above it and those below it."""

    up: Edge
    down: list[Edge]


class Tree(NamedTuple):
    """ranks: the root first. branches: from the leaves to the root."""

    ranks: list[int]
    branches: list[Branch]
    open_edge: Edge | None


class TwoCyclesError(ValueError):
    """Ranks and experts that are joined by more than one cycle."""


class Graph:
    def __init__(self, edges: Sequence[Edge]) -> None:
        self._at_expert: dict[int, list[Edge]] = {}
        self._at_rank: dict[int, list[Edge]] = {}
        for edge in edges:
            self._at_expert.setdefault(edge.expert, []).append(edge)
            self._at_rank.setdefault(edge.rank, []).append(edge)

    def tree(self, start: int) -> Tree:
        """The part of the graph that has rank `start`, opened where it has a cycle."""
        tree, extra = self._grown(start, None)
        if len(extra) > 1:
            raise TwoCyclesError(f"the part with rank {start} has {len(extra)} cycles")
        if extra:
            tree, _ = self._grown(extra[0].rank, extra[0])
        return tree

    def _grown(self, root: int, open_edge: Edge | None) -> tuple[Tree, list[Edge]]:
        """Breadth first from `root`; and the edges that lead to where it has been already."""
        ranks, seen, extra = [root], {root}, []
        branches: list[Branch] = []
        entered: set[int] = set()
        for above in ranks:
            for up in self._at_rank[above]:
                if up == open_edge or up.expert in entered:
                    continue
                entered.add(up.expert)
                others = [e for e in self._at_expert[up.expert] if e not in (up, open_edge)]
                down = [edge for edge in others if edge.rank not in seen]
                extra += [edge for edge in others if edge.rank in seen]
                seen.update(edge.rank for edge in down)
                ranks += [edge.rank for edge in down]
                branches.append(Branch(up, down))
        return Tree(ranks, branches[::-1], open_edge), extra
