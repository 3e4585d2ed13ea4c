"""`EvenLevels` for many batches at once, where copies join ranks to a forest. All ranks are alike.

V vertices: ranks R, then experts with a choice A; P parts, B batches.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from router.forest import BoolArray, Forest
from router.placement import IntArray


def even_room(forest: Forest, base_RB: IntArray, tokens_AB: IntArray) -> tuple[IntArray, IntArray]:
    """([R, B] what ranks get of tokens_AB, beside base_RB, to be as even as can be; batches that this
    cannot tell for, because means that are rounded to whole tokens do not fit)."""
    num_batches = base_RB.shape[1]
    part_V = forest.components()
    parts = _Parts(
        np.concatenate([base_RB, tokens_AB]),
        np.repeat(part_V[:, None], num_batches, axis=1),
        np.full(num_batches, part_V.max(initial=-1) + 1),
        num_ranks=len(base_RB),
    )
    room_RB, left = np.zeros_like(base_RB), np.arange(num_batches)
    unknown = []
    while len(left):
        base_RB, tokens_AB = np.split(parts.load_VB, [len(base_RB)])
        due_RB = parts.due() - base_RB
        tight_VB = forest.tightest_set(-due_RB, tokens_AB, parts.part_VB)
        tight_B = tight_VB.any(axis=0)
        room_RB[:, left[~tight_B]] = due_RB[:, ~tight_B]
        split_B = parts.split(tight_VB)
        unknown += left[tight_B & ~split_B].tolist()
        left, parts = left[split_B], parts.of(split_B)
    return room_RB, np.array(unknown, dtype=np.int64)


class _Parts:
    """part_VB: the part of each vertex, of count_B that are numbered from 0 in each batch."""

    def __init__(
        self, load_VB: IntArray, part_VB: IntArray, count_B: IntArray, *, num_ranks: int
    ) -> None:
        self.load_VB, self.part_VB, self._count_B = load_VB, part_VB, count_B
        self._num_ranks = num_ranks
        batches = len(count_B)
        self._flat_VB = part_VB * batches + np.arange(batches)
        self._shape = (int(count_B.max(initial=0)), batches)
        self._load_PB = self._sums(load_VB)
        self._size_PB = self._sums(np.ones((num_ranks, batches)))

    def of(self, chosen_B: BoolArray) -> _Parts:
        """Of some batches."""
        arrays = (self.load_VB, self.part_VB, self._count_B)
        return _Parts(*[array[..., chosen_B] for array in arrays], num_ranks=self._num_ranks)

    def due(self) -> IntArray:
        """[R, B]: the mean of each rank's part, in whole tokens that add up."""
        part_RB, flat_RB = self.part_VB[: self._num_ranks], self._flat_VB[: self._num_ranks]
        place_RB = np.empty_like(part_RB)  # in the order of parts
        order_RB = np.argsort(part_RB, axis=0, kind="stable")
        np.put_along_axis(place_RB, order_RB, np.arange(self._num_ranks)[:, None], axis=0)
        place_RB -= (np.cumsum(self._size_PB, axis=0) - self._size_PB).ravel()[flat_RB]
        each_PB, rest_PB = np.divmod(self._load_PB, np.maximum(self._size_PB, 1))
        rest_RB, size_RB = rest_PB.ravel()[flat_RB], self._size_PB.ravel()[flat_RB]
        until_RB: IntArray = (place_RB + 1) * rest_RB // size_RB
        until_RB -= place_RB * rest_RB // size_RB
        until_RB += each_PB.ravel()[flat_RB]
        return until_RB

    def split(self, tight_VB: BoolArray) -> BoolArray:
        """Those of `tight` with more than their part's mean become a part; [B]: whether any did."""
        above_PB = self._sums(self.load_VB * tight_VB)
        inner_PB = self._sums(tight_VB[: self._num_ranks])
        split_PB = above_PB * self._size_PB > self._load_PB * inner_PB
        name_PB = self._count_B + np.cumsum(split_PB, axis=0) - 1
        moves_VB = tight_VB & split_PB.ravel()[self._flat_VB]
        self.part_VB = np.where(moves_VB, name_PB.ravel()[self._flat_VB], self.part_VB)
        self._count_B = self._count_B + split_PB.sum(axis=0)
        return np.asarray(split_PB.any(axis=0))

    def _sums(self, amount_XB: NDArray[Any]) -> IntArray:
        """[P, B], of the first vertices; exact, as a float64 holds all tokens that a forest takes."""
        flat_X = self._flat_VB[: len(amount_XB)].ravel()
        rows, columns = self._shape
        sums = np.bincount(flat_X, weights=amount_XB.ravel(), minlength=rows * columns)
        return sums.astype(np.int64).reshape(self._shape)
