"""How the tokens of steps divide over the copies of their experts.

B steps, L expert layers, E logical experts, S slots of all ranks, C most copies of any expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from router.placement import Placement
from router.split_batches import BatchSplit

IntArray = NDArray[np.int64]
Shares = Callable[[Placement], NDArray[np.float64]]


class Division(Protocol):
    """Follows the placement: `use` one, then `divide`."""

    def use(self, placement: Placement, changed: Iterable[int]) -> None:
        """From now on this placement; only the layers `changed` differ from the last."""

    def divide(self, layer: int, counts_BE: IntArray) -> NDArray[np.generic]:
        """[B, S]: tokens of each slot of one layer."""


class EachBatch:
    """By each step's own counts, so that ranks are as even as the copies allow: `router.split`."""

    def __init__(self) -> None:
        self._splits: dict[int, BatchSplit] = {}

    def use(self, placement: Placement, changed: Iterable[int]) -> None:
        for layer in changed:
            self._splits[layer] = BatchSplit(placement.layer(layer))

    def divide(self, layer: int, counts_BE: IntArray) -> NDArray[np.generic]:
        return self._splits[layer].divide(counts_BE)


class Fixed:
    """In fixed shares, whatever the step's counts."""

    def __init__(self, shares: Shares) -> None:
        self._shares = shares

    def use(self, placement: Placement, changed: Iterable[int]) -> None:
        self._share_LS = self._shares(placement)
        self._expert_LS = np.maximum(placement.physical_to_logical, 0)  # empty slots: share 0

    def divide(self, layer: int, counts_BE: IntArray) -> NDArray[np.generic]:
        return np.asarray(counts_BE[:, self._expert_LS[layer]] * self._share_LS[layer])


def even_shares(placement: Placement) -> NDArray[np.float64]:
    """[L, S]: every copy of an expert gets as much, as EPLB plans for."""
    experts_LS = placement.physical_to_logical
    copies_LS = np.take_along_axis(placement.replica_counts, np.maximum(experts_LS, 0), axis=1)
    return np.where(experts_LS >= 0, 1.0 / np.maximum(copies_LS, 1), 0.0)


def static_shares(placement: Placement) -> NDArray[np.float64]:
    """[L, S]: by the rule of `LayerPlacement.choose_slots`, tokens coming from all ranks alike: of the
    copies on the source's node, or of all where there is none, the one that the source's number says.
    """
    slots_LEC = placement.logical_to_physical
    per_node = placement.slots_per_rank * (placement.ranks_per_node or placement.num_ranks)
    share_LS = np.zeros(placement.physical_to_logical.shape)
    layers = np.arange(placement.num_layers)[:, None]
    for source in range(placement.num_ranks):
        held_LEC = slots_LEC >= 0
        node = source * placement.slots_per_rank // per_node
        near_LEC = held_LEC & (slots_LEC // per_node == node)
        usable_LEC = np.where(near_LEC.any(axis=-1, keepdims=True), near_LEC, held_LEC)
        wanted_LE = source % usable_LEC.sum(axis=-1)
        place_LEC = np.cumsum(usable_LEC, axis=-1) - 1
        chosen_LE = (usable_LEC & (place_LEC == wanted_LE[..., None])).argmax(axis=-1)
        slot_LE = np.take_along_axis(slots_LEC, chosen_LE[..., None], axis=-1)[..., 0]
        share_LS[layers, slot_LE] += 1 / placement.num_ranks  # an expert is once in a slot's row
    return share_LS
