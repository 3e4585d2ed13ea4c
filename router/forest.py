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

A experts, R ranks, V both (ranks first), M edges, B batches, W conditions on the root (in the set, not
in it).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from router.placement import IntArray
from router.rooted_trees import Edge, Graph, Tree

BoolArray = NDArray[np.bool_]

_NEVER = -(1 << 61)
_LARGEST = 1 << 60
_EXACT = 1 << 53  # in float64


class Forest:
    """Edge i joins expert experts[i] and rank ranks[i], both numbered from 0; no two are alike.

    Raises TwoCyclesError where one open edge does not make a tree of each part.
    """

    def __init__(self, experts: Sequence[int], ranks: Sequence[int], *, num_ranks: int) -> None:
        self._num_edges, self._unit_bits = len(experts), num_ranks.bit_length()
        self._num_ranks = num_ranks
        self._expert_M = np.array(experts, dtype=np.int64)
        self._rank_M = np.array(ranks, dtype=np.int64)
        edges = [Edge(*edge) for edge in zip(range(len(experts)), experts, ranks, strict=True)]
        graph = Graph(edges)
        self._trees: list[Tree] = []
        seen: set[int] = set()
        for rank in ranks:
            if rank not in seen:
                self._trees.append(graph.tree(rank))
                seen.update(self._trees[-1].ranks)
        self._branches = [branch for tree in self._trees for branch in tree.branches]
        self._root = {rank: tree.ranks[0] for tree in self._trees for rank in tree.ranks}
        self._open_edges = [tree.open_edge for tree in self._trees if tree.open_edge]

    def most_tokens(self) -> int:
        """A batch may have so many at most, for what is computed of them to be exact."""
        return min(_EXACT, _LARGEST // (self._num_ranks << self._unit_bits))

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
        keys_RB, keys_AB = (above_RB << self._unit_bits) + 1, tokens_AB << self._unit_bits
        none_MB = np.zeros((self._num_edges, above_RB.shape[1]), dtype=np.bool_)
        gain_RWB, _ = self._gains(keys_RB, keys_AB, none_MB)
        found = []
        for tree in self._trees:
            below_WB = np.maximum(gain_RWB[tree.ranks[1:]], 0).sum(axis=0)
            found.append(np.maximum(gain_RWB[tree.ranks[0], 0] + below_WB[0], below_WB[-1]))
        key_B = np.max(found, axis=0)
        return key_B >> self._unit_bits, key_B & ((1 << self._unit_bits) - 1)

    def tightest_set(self, above_RB: IntArray, tokens_AB: IntArray, part_VB: IntArray) -> BoolArray:
        """[V, B]: the set of ranks with most tokens above what they should have, and its experts.

        None where none are above. part_VB: ranks get no tokens of experts in other parts.
        """
        closed_MB = part_VB[self._num_ranks + self._expert_M] != part_VB[self._rank_M]
        gain_RWB, gain_AWB = self._gains(above_RB, tokens_AB, closed_MB)
        set_VB = np.concatenate([gain_RWB[:, 0], gain_AWB[:, 0]]) > 0
        for tree in self._trees:
            if tree.open_edge is not None:
                self._condition(tree, set_VB, gain_RWB, gain_AWB, closed_MB)
        shut = list(np.logical_or.reduce(closed_MB, axis=1))
        ranks, experts = list(set_VB[: self._num_ranks]), list(set_VB[self._num_ranks :])
        for up, down in reversed(self._branches):
            is_in_B, edge = experts[up.expert], up.number
            is_in_B &= ranks[up.rank] | closed_MB[edge] if shut[edge] else ranks[up.rank]
            for edge, _, rank in down:
                ranks[rank] |= is_in_B & ~closed_MB[edge] if shut[edge] else is_in_B
        return set_VB

    def _condition(
        self,
        tree: Tree,
        set_VB: BoolArray,
        gain_RWB: IntArray,
        gain_AWB: IntArray,
        closed_MB: BoolArray,
    ) -> None:
        """In set_VB: whether the root is in the set, and what else would be where it is not."""
        root, *others = tree.ranks
        experts = [branch.up.expert for branch in tree.branches]
        apart_AB = closed_MB[[branch.up.number for branch in tree.branches]]
        below_WB = np.maximum(gain_RWB[others], 0).sum(axis=0)
        below_WB += (np.maximum(gain_AWB[experts], 0) * apart_AB[:, None]).sum(axis=0)
        set_VB[root] = gain_RWB[root, 0] + below_WB[0] > below_WB[1]
        for vertices, gain_XWB in (
            (np.array(others, dtype=np.int64), gain_RWB[others]),
            (np.array(experts) + self._num_ranks, gain_AWB[experts]),
        ):
            set_VB[vertices] = np.where(set_VB[root], gain_XWB[:, 0] > 0, gain_XWB[:, 1] > 0)

    def _gains(
        self, above_RB: IntArray, tokens_AB: IntArray, closed_MB: BoolArray
    ) -> tuple[IntArray, IntArray]:
        """[R, W, B], [A, W, B]: by how much the best set of ranks in its subtree is better with a
        rank, or with all that an expert's tokens need, than without."""
        conditions = 2 if self._open_edges else 1
        gain_RWB = np.repeat(above_RB[:, None], conditions, axis=1)
        gain_AWB = np.repeat(tokens_AB[:, None], conditions, axis=1)
        for edge, expert, _ in self._open_edges:
            gain_AWB[expert, 1] = np.where(closed_MB[edge], tokens_AB[expert], _NEVER)
        shut = list(np.logical_or.reduce(closed_MB, axis=1))
        ranks, experts = list(gain_RWB), list(gain_AWB)
        for up, down in self._branches:
            gain_WB = experts[up.expert]
            for edge, _, rank in down:
                lost_WB = np.minimum(ranks[rank], 0)
                if shut[edge]:
                    lost_WB[:, closed_MB[edge]] = 0
                gain_WB += lost_WB
            won_WB = np.maximum(gain_WB, 0)
            if shut[up.number]:
                won_WB[:, closed_MB[up.number]] = 0
            ranks[up.rank] += won_WB
        return gain_RWB, gain_AWB

    def components(self) -> IntArray:
        """[V]: of each rank, then of each expert, numbered from 0."""
        roots = [self._root.get(rank, rank) for rank in range(self._num_ranks)]
        of_R = np.unique(roots, return_inverse=True)[1].astype(np.int64)
        of_A = np.zeros(self._expert_M.max(initial=-1) + 1, dtype=np.int64)
        of_A[self._expert_M] = of_R[self._rank_M]
        return np.concatenate([of_R, of_A])

    def flow(self, room_RB: IntArray, tokens_AB: IntArray) -> IntArray:
        """[edges, B] of all tokens, within the ranks' room, which must be enough."""
        flow = np.zeros((self._num_edges, room_RB.shape[1]), dtype=np.int64)
        left_AB = self._pour(flow, room_RB.copy(), tokens_AB.copy())
        if not self._open_edges:
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
        for up, down in self._branches:
            left_B = lefts[up.expert]
            for edge, _, rank in (*down, up):
                room_B = rooms[rank]
                amount_B = np.minimum(left_B, room_B, out=flow[edge])
                left_B -= amount_B
                room_B -= amount_B
        return left_AB
