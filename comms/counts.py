"""How many tokens every rank has for each expert, known to all: one small exchange per layer.

Inside the node ranks tell each other their counts, and along the rails nodes their sums. That is what
a division of the whole batch needs: who is before me in my node, and what each node has.

N nodes, M ranks of my node, E experts (or whatever is counted).
"""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from comms.base import BaseDispatcher, Booked
from comms.group import Group

Counts = NDArray[np.int64]


class BatchCounts(NamedTuple):
    """ranks_ME: of each rank of my node; nodes_NE: sums of each node. The same for all it concerns."""

    ranks_ME: Counts
    nodes_NE: Counts


class CountExchange:
    """Of one rank, shared by all layers; booked with its dispatcher as stages "counts/...".

    Collective over the world, in the order of dispatches: where one is in flight, the exchange
    waits for its bytes.
    """

    def __init__(self, dispatcher: BaseDispatcher) -> None:
        self._dispatcher = dispatcher
        self.groups = dispatcher.groups

    def __call__(self, counts_E: Counts) -> BatchCounts:
        """Raises ValueError unless counts are one per expert and small enough to add up in a node."""
        low, high = counts_E.min(initial=0), counts_E.max(initial=0)
        if counts_E.ndim != 1 or low < 0 or high * self.groups.node.size >= 1 << 31:
            raise ValueError(
                f"counts must be [experts], from 0 to 2**31 / {self.groups.node.size} ranks, got "
                f"shape {list(counts_E.shape)} with {low} to {high}"
            )
        ranks_ME = self._gather("counts/node", self.groups.node, counts_E)
        nodes_NE = self._gather("counts/rail", self.groups.rail, ranks_ME.sum(axis=0))
        return BatchCounts(ranks_ME, nodes_NE)

    def _gather(self, stage: str, group: Group, counts_E: Counts) -> Counts:
        if group.size == 1:
            return counts_E[None]
        mine = torch.from_numpy(counts_E.astype(np.int32)).view(torch.uint8)
        parts = Booked(self._dispatcher, stage, group, [[mine] * group.size]).wait()
        rows = [part.numpy().view(np.int32) for part in parts]
        return np.stack(rows).astype(np.int64)
