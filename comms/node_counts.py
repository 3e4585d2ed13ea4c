"""Exact numbers of rows between nodes, for steps of so many rows that what nobody needs costs more than a
word from the device.

Legend: T my tokens, K top-k, M nodes, N rows per source.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from comms.kernels.progress import tell_host
from comms.rail import Rail
from comms.rail_watch import Progress


@dataclass(frozen=True, kw_only=True)
class Counts:
    """places_MN: int32, where among the rows for node m mine has its place, -1 for those without.
    arrived_M: int32, rows that came from each node; sent_to, came_from: the numbers, on the host. node: mine."""

    node: int
    places_MN: Tensor
    arrived_M: Tensor
    sent_to: tuple[int, ...]
    came_from: tuple[int, ...]

    def sent(self, x_MN: Tensor) -> list[Tensor]:
        """What concerns the rows that I sent, by node."""
        return _cut(x_MN, self.sent_to)

    def arrived(self, x_MN: Tensor) -> list[Tensor]:
        """What concerns the rows that came."""
        return _cut(x_MN, self.came_from)

    @property
    def num_sent(self) -> int:
        """Rows of mine that other nodes get."""
        return sum(self.sent_to) - self.sent_to[self.node]

    @property
    def num_came(self) -> int:
        """Rows that other nodes get a sum of."""
        return sum(self.came_from) - self.came_from[self.node]

    @classmethod
    def exchange(
        cls, slots_TK: Tensor, num_rows: int, slots_per_node: int, rail: Rail, progress: Progress
    ) -> Counts:
        """Collective over the rail; waits for the device."""
        tell_host[(1,)](*progress.tensors)
        device, num_tokens = slots_TK.device, len(slots_TK)
        node_TK = torch.where(slots_TK >= 0, slots_TK // slots_per_node, -1)
        node_M = torch.arange(rail.size, device=device)
        needs_MN = torch.zeros((rail.size, num_rows), dtype=torch.bool, device=device)
        needs_MN[:, :num_tokens] = (node_TK[None] == node_M[:, None, None]).any(2)
        places_MN = needs_MN.cumsum(1, dtype=torch.int32).sub_(1).masked_fill_(~needs_MN, -1)
        sent_M = needs_MN.sum(1, dtype=torch.int32)
        arrived_M = sent_M.clone()
        rail.start(arrived_M.split(1), sent_M.split(1))
        rail.finish()
        sent_to, came_from = torch.stack((sent_M, arrived_M)).tolist()
        return cls(
            node=rail.idx,
            places_MN=places_MN,
            arrived_M=arrived_M,
            sent_to=tuple(sent_to),
            came_from=tuple(came_from),
        )


def _cut(x_MN: Tensor, counts: Sequence[int]) -> list[Tensor]:
    return [rows[:count] for rows, count in zip(x_MN.unbind(), counts, strict=True)]
