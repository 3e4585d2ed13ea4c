"""The ranks that a plan is for: nodes, slots, speeds."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from router.placement import IntArray, Placement
from router.split import resplit_optima


@dataclass(frozen=True, kw_only=True, eq=False)
class Ranks:
    """speed_R [R]: float64, relative, of mean 1. Consecutive ranks share a node, equally many each."""

    num_nodes: int
    slots_per_rank: int
    speed_R: NDArray[np.float64]

    @property
    def num_ranks(self) -> int:
        return len(self.speed_R)

    @property
    def num_slots(self) -> int:
        return self.num_ranks * self.slots_per_rank

    @property
    def ranks_per_node(self) -> int:
        return self.num_ranks // self.num_nodes

    @cached_property
    def striped(self) -> IntArray:
        """All ranks in an order in which any num_nodes consecutive ones are on different nodes."""
        position = np.arange(self.num_ranks)
        return position % self.num_nodes * self.ranks_per_node + position // self.num_nodes

    def capacity_R(self, load_E: NDArray[np.float64] | IntArray) -> NDArray[np.float64]:
        """What each rank should carry."""
        capacity_R: NDArray[np.float64] = self.speed_R * (load_E.sum() / self.num_ranks)
        return capacity_R

    def imbalance(self, row_S: IntArray, load_E: NDArray[np.float64]) -> float:
        """Max / mean of load / speed over ranks, each expert's load divided as well as can be."""
        placement = Placement(
            physical_to_logical=row_S[None],
            num_experts=len(load_E),
            num_ranks=self.num_ranks,
            ranks_per_node=self.ranks_per_node,
        )
        return float(resplit_optima(load_E[None], placement, self.speed_R)[0])


def num_moves(present_S: IntArray, target_S: IntArray, slots_per_rank: int) -> int:
    """Experts that a rank holds in `target` and not in `present`."""
    before = present_S.reshape(-1, slots_per_rank).tolist()
    after = target_S.reshape(-1, slots_per_rank).tolist()
    return sum(len(set(new) - set(old) - {-1}) for old, new in zip(before, after, strict=True))
