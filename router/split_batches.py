"""How many batches of one layer divide over its copies, all at once.

`LayerSplit` answers for one batch, as ranks need it in every step; simulations ask for thousands of
batches under one placement. The ranks' loads are the same, but for which of equals has a token more.

B batches, E logical experts, C copies, S slots of all ranks, R ranks, A experts with a choice: copies
on several ranks; an edge is one (such expert, rank that holds it).
"""

from __future__ import annotations

import numpy as np

from router.even_batches import even_room
from router.forest import Forest
from router.placement import IntArray, LayerPlacement
from router.rooted_trees import TwoCyclesError
from router.split import LayerSplit


class BatchSplit:
    """The copies of one layer, prepared for many batches. All ranks are alike; of an expert's copies on
    one rank only the first is used. `one`: the same copies for one batch."""

    def __init__(self, layer: LayerPlacement) -> None:
        self.layer = layer
        self.one = LayerSplit(layer)
        copies = self.one.copies
        self._several, self._single = copies.several_A, copies.single
        self._single_slot = layer.logical_to_physical[self._single, 0]
        self._edge_slot = copies.edge_slot
        edge_rank = self._edge_slot // layer.slots_per_rank
        try:
            self._forest: Forest | None = Forest(
                copies.edge_expert.tolist(), edge_rank.tolist(), num_ranks=layer.num_ranks
            )
        except TwoCyclesError:
            self._forest = None

    @property
    def at_once(self) -> bool:
        """Whether batches are solved together; if copies form several cycles, one after the other."""
        return self._forest is not None

    def optimum(self, counts_BE: IntArray) -> IntArray:
        """[B]: `LayerSplit.optimum` of each batch."""
        forest, counts_BE = self._forest_for(counts_BE)
        if forest is None:
            return np.array([self.one.optimum(counts_E) for counts_E in counts_BE], dtype=np.int64)
        return forest.least_level(*self._loads(counts_BE))

    def divide(self, counts_BE: IntArray) -> IntArray:
        """[B, S]: tokens of each slot. They add up to counts_BE; ranks are as even as can be."""
        forest, counts_BE = self._forest_for(counts_BE)
        slot_BS = np.zeros((len(counts_BE), self.layer.num_slots), dtype=np.int64)
        one_by_one = np.arange(len(counts_BE))
        if forest is not None:
            base_RB, tokens_AB = self._loads(counts_BE)
            room_RB, one_by_one = even_room(forest, base_RB, tokens_AB)
            slot_BS[:, self._single_slot] = counts_BE[:, self._single]
            slot_BS[:, self._edge_slot] = forest.flow(room_RB, tokens_AB).T
        held_EC = self.layer.logical_to_physical >= 0
        slots = self.layer.logical_to_physical[held_EC]
        for batch in one_by_one:
            slot_BS[batch, slots] = self.one.by_copy(counts_BE[batch])[held_EC]
        return slot_BS

    def _forest_for(self, counts_BE: IntArray) -> tuple[Forest | None, IntArray]:
        counts_BE = np.asarray(counts_BE, dtype=np.int64)
        most = int(counts_BE.sum(axis=1).max(initial=0))
        if self._forest is None or most > self._forest.most_tokens():
            return None, counts_BE
        return self._forest, counts_BE

    def _loads(self, counts_BE: IntArray) -> tuple[IntArray, IntArray]:
        """(tokens that have no other rank to go to [R, B], those of experts with a choice [A, B])."""
        counts_EB = counts_BE.T
        slot_SB = np.zeros((self.layer.num_slots, len(counts_BE)), dtype=np.int64)
        slot_SB[self._single_slot] = counts_EB[self._single]
        by_rank = (self.layer.num_ranks, self.layer.slots_per_rank, len(counts_BE))
        base_RB: IntArray = slot_SB.reshape(by_rank).sum(axis=1)
        return base_RB, counts_EB[self._several]
