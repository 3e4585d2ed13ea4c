"""What others would do with the bytes of a bfloat16 dispatch: a plain copy over the link, and NCCL.

Legend: T tokens of a rank, H hidden, W ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from comms.group import Group
from comms.nccl import NcclRail
from comms.store import Store
from comms.symmetric_memory import SymmetricMemory
from simulations.bench.exchange_times import Call, Figures, timed
from simulations.bench.exchange_workload import RankTensors


@dataclass(frozen=True, kw_only=True)
class Peers:
    """memory: that the next rank shares."""

    tensors: RankTensors
    memory: SymmetricMemory
    nccl: NcclRail

    @classmethod
    def connect(cls, tensors: RankTensors, store: Store) -> Peers:
        """Collective."""
        work, rank, device = tensors.workload, tensors.rank, tensors.device
        num_bytes = max(work.tokens) * work.hidden * 2
        return cls(
            tensors=tensors,
            memory=SymmetricMemory.connect(store, rank, work.ranks, num_bytes, device),
            nccl=NcclRail(store, rank, range(work.ranks), device, name="bench"),
        )

    def figures(self, world: Group, tokens: int) -> dict[str, Figures]:
        """Collective."""
        world_size, hidden = self.tensors.workload.ranks, self.tensors.workload.hidden
        next_rank = (self.tensors.rank + 1) % world_size
        there = self.memory.handle.get_buffer(next_rank, (tokens * hidden,), torch.bfloat16)
        inputs = [x.x_TH for x in self.tensors.copies(tokens)]
        calls: list[Call] = [partial(there.view(tokens, hidden).copy_, x) for x in inputs]
        found = {"peer_copy": timed(world, calls, tokens * hidden * 2)}
        x_WTH = torch.stack([inputs[0]] * world_size)
        out_WTH = torch.empty_like(x_WTH)
        calls = [partial(self.nccl.start, out_WTH.unbind(), x_WTH.unbind())] * 2
        found["nccl"] = timed(world, calls, (world_size - 1) * tokens * hidden * 2)
        return found

    def close(self) -> None:
        self.nccl.close()
