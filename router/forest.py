"""Tokens of experts that several ranks hold, divided over the ranks in many batches at once.

Copies join ranks to a forest nearly always, or to one with a single cycle in each part. In a rooted
tree a maximum flow and the tightest set of ranks are found in one pass from the leaves to the root, in
an order that is the same for all batches. What a batch decides are minima and maxima, so arrays of
batches go through the passes together.

Tightest set. A maximum of T tokens per rank is impossible if some set of ranks has more tokens that
can go nowhere else than T for each rank (Hall); the mean of the set with most above T is the next T
(Dinkelbach). For each rank: the best set in its subtree with the rank, and without. An expert's tokens
count where all of its ranks are in the set. A cycle is opened at one edge, whose rank is the root: with
the root in the set the edge may be left out; without it the edge's expert never counts.

Flow. A leaf takes, or gives away, as much as its last edge can carry. An open edge carries what is left
over if it carries nothing: with less as much would be left over still, and what it carried on top of
that others might not be able to give.

A experts, R ranks, B batches, W conditions on the root (in the set, not in it).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from router.placement import IntArray

_NEVER = -(1 << 61)
_LARGEST = 1 << 60


class _Edge(NamedTuple):
    number: int
    expert: int
    rank: int


class _Branch(NamedTuple):
    """An expert, the rank above it and those below it. is_open: it has an open edge besides."""

    up: _Edge
    down: list[_Edge]
    is_open: bool


class _Tree(NamedTuple):
    """ranks: the root first. branches: from the leaves to the root."""

    ranks: list[int]
    branches: list[_Branch]
    open_edge: _Edge | None


class TwoCyclesError(ValueError):
    """Ranks and experts that are joined by more than one cycle."""


class Forest:
    """Edge i joins expert experts[i] and rank ranks[i], both numbered from 0; no two are alike.

    Raises TwoCyclesError where one open edge does not make a tree of each part.
    """

    def __init__(self, experts: Sequence[int], ranks: Sequence[int], *, num_ranks: int) -> None:
        self._num_edges, self._unit_bits = len(experts), num_ranks.bit_length()
        self._num_ranks = num_ranks
        edges = [_Edge(*edge) for edge in zip(range(len(experts)), experts, ranks, strict=True)]
        graph = _Graph(edges)
        self._trees: list[_Tree] = []
        seen: set[int] = set()
        for rank in ranks:
            if rank not in seen:
                self._trees.append(graph.tree(rank))
                seen.update(self._trees[-1].ranks)
        self._branches = [branch for tree in self._trees for branch in tree.branches]
        self._is_open = any(tree.open_edge for tree in self._trees)

    def most_tokens(self) -> int:
        """A batch may have so many at most, for what is computed of them to fit 64 bits."""
        return _LARGEST // (self._num_ranks << self._unit_bits)

    def least_level(self, base_RB: IntArray, tokens_AB: IntArray) -> IntArray:
        """[B]: the least T for which no rank needs more than T tokens, base_RB among them."""
        level_B: IntArray = base_RB.max(axis=0)
        for tree in self._trees:
            experts = [branch.up.expert for branch in tree.branches]
            load_B = base_RB[tree.ranks].sum(axis=0) + tokens_AB[experts].sum(axis=0)
            np.maximum(level_B, -(-load_B // len(tree.ranks)), out=level_B)
        left = np.arange(len(level_B) if self._trees else 0)
        while len(left):
            above_B, size_B = self._tightest(base_RB[:, left] - level_B[left], tokens_AB[:, left])
            tight = above_B > 0
            left = left[tight]
            level_B[left] += -(-above_B[tight] // size_B[tight])
        return level_B

    def _tightest(self, above_RB: IntArray, tokens_AB: IntArray) -> tuple[IntArray, IntArray]:
        """(tokens above the level, ranks) of the set of ranks with most above it, [B] each.

        Both are one number, tokens * unit + ranks, so that sums and maxima are of both at once.
        """
        shape_WB = (2 if self._is_open else 1, above_RB.shape[1])
        inside = list(np.repeat((above_RB[:, None] << self._unit_bits) + 1, shape_WB[0], axis=1))
        outside = list(np.zeros((len(inside), *shape_WB), dtype=np.int64))
        for up, down, is_open in self._branches:
            gain_WB = tokens_AB[up.expert] << self._unit_bits
            if is_open:
                gain_WB = np.stack([gain_WB, np.full_like(gain_WB, _NEVER)])
            best_WB: IntArray | int = 0
            for _, _, rank in down:
                gain_WB = gain_WB + inside[rank]
                best_WB = best_WB + np.maximum(inside[rank], outside[rank])
            inside[up.rank] += np.maximum(gain_WB, best_WB)
            outside[up.rank] += best_WB
        roots = [tree.ranks[0] for tree in self._trees]
        key_B = np.max([np.maximum(inside[r][0], outside[r][-1]) for r in roots], axis=0)
        return key_B >> self._unit_bits, key_B & ((1 << self._unit_bits) - 1)

    def flow(self, room_RB: IntArray, tokens_AB: IntArray) -> IntArray:
        """[edges, B] of all tokens, within the ranks' room, which must be enough."""
        flow = np.zeros((self._num_edges, room_RB.shape[1]), dtype=np.int64)
        left_AB = self._pour(flow, room_RB.copy(), tokens_AB.copy())
        if not self._is_open:
            return flow
        room_RB, tokens_AB = room_RB.copy(), tokens_AB.copy()
        for tree in self._trees:
            if tree.open_edge is not None:
                edge, expert, rank = tree.open_edge
                flow[edge] = left_AB[[branch.up.expert for branch in tree.branches]].sum(axis=0)
                tokens_AB[expert] -= flow[edge]
                room_RB[rank] -= flow[edge]
        self._pour(flow, room_RB, tokens_AB)
        return flow

    def _pour(self, flow: IntArray, room_RB: IntArray, left_AB: IntArray) -> IntArray:
        """Fill all edges but the open ones; what is left of each expert's tokens."""
        rooms, lefts = list(room_RB), list(left_AB)
        for up, down, _ in self._branches:
            left_B = lefts[up.expert]
            for edge, _, rank in (*down, up):
                room_B = rooms[rank]
                amount_B = np.minimum(left_B, room_B, out=flow[edge])
                left_B -= amount_B
                room_B -= amount_B
        return left_AB


class _Graph:
    def __init__(self, edges: Sequence[_Edge]) -> None:
        self._at_expert: dict[int, list[_Edge]] = {}
        self._at_rank: dict[int, list[_Edge]] = {}
        for edge in edges:
            self._at_expert.setdefault(edge.expert, []).append(edge)
            self._at_rank.setdefault(edge.rank, []).append(edge)

    def tree(self, start: int) -> _Tree:
        """The part of the graph that has rank `start`, opened where it has a cycle."""
        tree, extra = self._grown(start, None)
        if len(extra) > 1:
            raise TwoCyclesError(f"the part with rank {start} has {len(extra)} cycles")
        if extra:
            tree, _ = self._grown(extra[0].rank, extra[0])
        return tree

    def _grown(self, root: int, open_edge: _Edge | None) -> tuple[_Tree, list[_Edge]]:
        """Breadth first from `root`; and the edges that lead to where it has been already."""
        ranks, seen, extra = [root], {root}, []
        branches: list[_Branch] = []
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
                is_open = open_edge is not None and open_edge.expert == up.expert
                branches.append(_Branch(up, down, is_open))
        return _Tree(ranks, branches[::-1], open_edge), extra
