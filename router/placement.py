"""Which slot of which rank holds which expert, layer by layer.

A slot holds one physical expert; global slot id = rank * slots_per_rank + local slot. A *placement*
is the full assignment at one *epoch*: every logical expert has at least one copy, spare slots hold
redundant copies or stay empty. Tokens name logical experts, dispatchers know slots; this module is
the only translation between the two.

L layers with experts, S slots of all ranks, E logical experts, C most copies of any expert,
T tokens, K experts per token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

IntArray = NDArray[np.int64]


class Move(NamedTuple):
    """Slot `slot` of `layer` gets `expert`, which its rank does not hold yet."""

    layer: int
    slot: int
    expert: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Placement:
    """physical_to_logical [L, S]: the logical expert in each slot, -1 where it is empty.

    `ranks_per_node` None: all ranks are one node. Raises ValueError if an expert of a layer has no
    copy, or if the sizes do not fit together.
    """

    physical_to_logical: IntArray
    num_experts: int
    num_ranks: int
    ranks_per_node: int | None = None
    epoch: int = 0

    def __post_init__(self) -> None:
        physical = np.array(self.physical_to_logical, dtype=np.int64)
        physical.setflags(write=False)
        object.__setattr__(self, "physical_to_logical", physical)
        if min(self.num_experts, self.num_ranks) < 1 or self.epoch < 0:
            raise ValueError(
                f"Invalid placement: num_experts({self.num_experts}) and "
                f"num_ranks({self.num_ranks}) must be >= 1, epoch({self.epoch}) >= 0"
            )
        per_node = self.num_ranks if self.ranks_per_node is None else self.ranks_per_node
        if per_node < 1 or self.num_ranks % per_node:
            raise ValueError(
                f"Invalid placement: num_ranks({self.num_ranks}) is no multiple of "
                f"ranks_per_node({per_node})"
            )
        object.__setattr__(self, "ranks_per_node", per_node)
        if physical.ndim != 2 or physical.shape[1] % self.num_ranks or physical.shape[1] == 0:
            raise ValueError(
                f"Invalid placement: physical_to_logical {list(physical.shape)} is not "
                f"[layers, num_ranks({self.num_ranks}) * slots_per_rank]"
            )
        outside = (physical < -1) | (physical >= self.num_experts)
        if outside.any():
            layer, slot = (int(i) for i in np.argwhere(outside)[0])
            raise ValueError(
                f"Invalid placement: layer {layer}, slot {slot} holds expert "
                f"{physical[layer, slot]}, outside [-1, num_experts({self.num_experts}))"
            )
        for layer, counts in enumerate(self.replica_counts):
            if not counts.all():
                raise ValueError(
                    f"Invalid placement: layer {layer} has no copy of experts "
                    f"{np.flatnonzero(counts == 0).tolist()}"
                )

    @staticmethod
    def contiguous(
        num_layers: int,
        num_experts: int,
        num_ranks: int,
        num_redundant_experts: int = 0,
        *,
        ranks_per_node: int | None = None,
        epoch: int = 0,
    ) -> Placement:
        """Consecutive experts on consecutive ranks, as evenly as possible, alike in every layer.

        slots_per_rank = ceil((num_experts + num_redundant_experts) / num_ranks); what is left over
        stays empty. Redundant copies go to the emptiest rank, each expert's to a rank and a node
        without one as long as such a choice exists. Raises ValueError for impossible counts.
        """
        if min(num_layers, num_redundant_experts) < 0 or min(num_experts, num_ranks) < 1:
            raise ValueError(
                f"Invalid placement: num_layers({num_layers}) and num_redundant_experts("
                f"{num_redundant_experts}) must be >= 0, num_experts({num_experts}) and "
                f"num_ranks({num_ranks}) >= 1"
            )
        slots_per_rank = -(-(num_experts + num_redundant_experts) // num_ranks)
        per_node = num_ranks if ranks_per_node is None else max(1, ranks_per_node)
        hosted = [
            list(range(num_experts * rank // num_ranks, num_experts * (rank + 1) // num_ranks))
            for rank in range(num_ranks)
        ]
        copies = [1] * num_experts
        for _ in range(num_redundant_experts):
            rank = min(range(num_ranks), key=lambda r: len(hosted[r]))
            first = rank // per_node * per_node
            on_node = {e for experts in hosted[first : first + per_node] for e in experts}
            expert = min(
                range(num_experts),
                key=lambda e: (e in hosted[rank], copies[e], e in on_node, e),
            )
            hosted[rank].append(expert)
            copies[expert] += 1
        row = [e for experts in hosted for e in experts + [-1] * (slots_per_rank - len(experts))]
        return Placement(
            physical_to_logical=np.tile(np.array(row, dtype=np.int64), (num_layers, 1)),
            num_experts=num_experts,
            num_ranks=num_ranks,
            ranks_per_node=ranks_per_node,
            epoch=epoch,
        )

    @property
    def num_layers(self) -> int:
        return len(self.physical_to_logical)

    @property
    def num_slots(self) -> int:
        """Slots of all ranks in one layer."""
        return int(self.physical_to_logical.shape[1])

    @property
    def slots_per_rank(self) -> int:
        return self.num_slots // self.num_ranks

    @cached_property
    def replica_counts(self) -> IntArray:
        """[L, E]: how many copies each expert has."""
        counts = np.zeros((self.num_layers, self.num_experts), dtype=np.int64)
        layer_idx, slot_idx = np.nonzero(self.physical_to_logical >= 0)
        np.add.at(counts, (layer_idx, self.physical_to_logical[layer_idx, slot_idx]), 1)
        counts.setflags(write=False)
        return counts

    @cached_property
    def logical_to_physical(self) -> IntArray:
        """[L, E, C]: the slots of each expert's copies, ascending, padded with -1."""
        max_copies = int(self.replica_counts.max(initial=1))
        table = np.full((self.num_layers, self.num_experts, max_copies), -1, dtype=np.int64)
        layers, slots = np.nonzero(self.physical_to_logical >= 0)
        experts = self.physical_to_logical[layers, slots]
        order = np.lexsort((slots, experts, layers))
        layers, slots, experts = layers[order], slots[order], experts[order]
        of_same = layers * self.num_experts + experts
        starts = np.flatnonzero(np.diff(of_same, prepend=-1))
        lengths = np.diff(starts, append=len(of_same))
        table[layers, experts, np.arange(len(of_same)) - np.repeat(starts, lengths)] = slots
        table.setflags(write=False)
        return table

    def slots_of_rank(self, rank: int) -> range:
        """Global slot ids of one rank."""
        if not 0 <= rank < self.num_ranks:
            raise ValueError(f"rank({rank}) is outside [0, num_ranks({self.num_ranks}))")
        return range(rank * self.slots_per_rank, (rank + 1) * self.slots_per_rank)

    def experts_of_rank(self, layer: int, rank: int) -> dict[int, int]:
        """Local slot -> logical expert, for the slots of `rank` that are not empty."""
        slots = self.slots_of_rank(rank)
        row = self.physical_to_logical[layer, slots.start : slots.stop]
        return {i: int(expert) for i, expert in enumerate(row) if expert >= 0}

    def with_layers(self, rows: Mapping[int, IntArray], epoch: int | None = None) -> Placement:
        """The same placement with other rows [S] for some layers, at the next epoch (or `epoch`)."""
        physical = self.physical_to_logical.copy()
        for layer, row in rows.items():
            physical[layer] = row
        return Placement(
            physical_to_logical=physical,
            num_experts=self.num_experts,
            num_ranks=self.num_ranks,
            ranks_per_node=self.ranks_per_node,
            epoch=self.epoch + 1 if epoch is None else epoch,
        )

    def moves_from(self, current: Placement) -> list[Move]:
        """Each expert that a rank holds here and not in `current`: what has to travel."""
        moves = []
        for layer, slot in np.argwhere(self.physical_to_logical != current.physical_to_logical):
            rank = int(slot) // self.slots_per_rank
            expert = int(self.physical_to_logical[layer, slot])
            mine = current.slots_of_rank(rank)
            if expert >= 0 and expert not in current.physical_to_logical[layer, mine]:
                moves.append(Move(int(layer), int(slot), expert))
        return moves

    def layer(self, layer: int) -> LayerPlacement:
        """The part of this placement that one MoE layer needs."""
        ranks_per_node = self.ranks_per_node or self.num_ranks
        return LayerPlacement(
            logical_to_physical=self.logical_to_physical[layer],
            slots_per_rank=self.slots_per_rank,
            slots_per_node=self.slots_per_rank * ranks_per_node,
            num_ranks=self.num_ranks,
            epoch=self.epoch,
        )


def settle(current_S: IntArray, target_S: IntArray, slots_per_rank: int) -> IntArray:
    """The target row with the same experts on every rank, where each that stays keeps its slot."""
    settled_S = np.full_like(target_S, -1)
    for start in range(0, len(target_S), slots_per_rank):
        mine = slice(start, start + slots_per_rank)
        arriving = target_S[mine][target_S[mine] >= 0].tolist()
        row = settled_S[mine]
        for slot, expert in enumerate(current_S[mine].tolist()):
            if expert in arriving:
                row[slot] = expert
                arriving.remove(expert)
        row[np.flatnonzero(row < 0)[: len(arriving)]] = arriving
    return settled_S


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerPlacement:
    """logical_to_physical [E, C] of one layer, and the choice among an expert's copies."""

    logical_to_physical: IntArray
    slots_per_rank: int
    slots_per_node: int
    num_ranks: int
    epoch: int
    _tables: dict[int, Tensor] = field(default_factory=dict, repr=False)

    @property
    def num_experts(self) -> int:
        return len(self.logical_to_physical)

    @property
    def num_slots(self) -> int:
        """Of all ranks."""
        return self.num_ranks * self.slots_per_rank

    @property
    def num_nodes(self) -> int:
        return self.num_ranks * self.slots_per_rank // self.slots_per_node

    def choose_slots(self, ids_TK: Tensor, source_rank: int) -> Tensor:
        """Logical expert ids (int64, -1 = none) to global slot ids of the copies to use (-1 = none).

        Copies on the source's own node come first; among those left, copy number `source_rank` mod
        their count, so that sources spread over them. With one copy the source does not matter.
        """
        table_E = self._tables.get(source_rank)
        if table_E is None:
            table_E = self._tables[source_rank] = self._table(source_rank)
        return table_E[ids_TK]

    def _table(self, source_rank: int) -> Tensor:
        """[E + 1]: the slot for each expert; the last entry, -1, is what id -1 finds."""
        node = source_rank * self.slots_per_rank // self.slots_per_node
        chosen = []
        for row in self.logical_to_physical:
            copies = row[row >= 0]
            near = copies[copies // self.slots_per_node == node]
            candidates = near if len(near) else copies
            chosen.append(int(candidates[source_rank % len(candidates)]))
        return torch.tensor([*chosen, -1], dtype=torch.int64)
