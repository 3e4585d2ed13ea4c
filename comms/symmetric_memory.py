"""Memory of one GPU that the other GPUs of the node read and write as their own, over NVLink.

torch maps it: every rank allocates the same number of bytes and passes a handle to the others, through
the store and a socket of this host. No process group is needed, and NVLink multicast is not used.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from comms.store import PrefixStore, Store

_names = itertools.count()  # of rendezvous in this process: torch knows each by its name, for good


@dataclass(frozen=True, kw_only=True)
class SymmetricMemory:
    """`bytes`: uint8, mine, zeroed before any peer could write. `addresses`: of every rank's, as
    seen from here. `handle`: what keeps the peers' memory mapped; `group`: the ranks, for torch."""

    rank: int
    bytes: Tensor
    addresses: tuple[int, ...]
    handle: Any = None
    group: Any = None

    @property
    def world_size(self) -> int:
        return len(self.addresses)

    def check_fits(self, world_size: int, num_bytes: int) -> None:
        """Raise ValueError for a layout of other ranks, or that is larger."""
        if world_size != self.world_size or self.bytes.numel() < num_bytes:
            raise ValueError(
                f"a layout of {world_size} ranks and {num_bytes} bytes does not fit memory of "
                f"{self.world_size} ranks and {self.bytes.numel()} bytes"
            )

    @property
    def device(self) -> torch.device:
        return self.bytes.device

    @classmethod
    def connect(
        cls, store: Store, rank: int, world_size: int, num_bytes: int, device: torch.device
    ) -> SymmetricMemory:
        """Collective over the ranks of a node, each with a GPU of its own, in the same order on all.

        Raises torch's DistStoreError when the store's timeout is over before all came, RuntimeError
        where GPUs cannot reach each other.
        """
        if world_size == 1:
            return cls.in_one_process(1, num_bytes, device)[0]
        from torch._C._distributed_c10d import (
            ProcessGroup,
            _register_process_group,
            _SymmetricMemory,
        )

        # Some versions of torch look a group up by its name, some what was said of it: no other use.
        name = f"expertmesh/{next(_names)}"
        store = PrefixStore(name, store)
        group = ProcessGroup(store, rank, world_size)
        _register_process_group(name, group)  # type: ignore[arg-type,unused-ignore]
        _SymmetricMemory.set_group_info(name, rank, world_size, store)
        with torch.cuda.device(device):
            memory = _SymmetricMemory.empty_strided_p2p((num_bytes,), (1,), torch.uint8, device)
            memory.zero_()
            torch.cuda.synchronize(device)
            handle = _SymmetricMemory.rendezvous(memory, name)
        return cls(
            rank=rank, bytes=memory, addresses=tuple(handle.buffer_ptrs), handle=handle, group=group
        )

    @classmethod
    def in_one_process(
        cls, world_size: int, num_bytes: int, device: torch.device
    ) -> list[SymmetricMemory]:
        """Of ranks that share a device and a process, in rank order: for tests, and a world of one."""
        parts = [
            torch.zeros(num_bytes, dtype=torch.uint8, device=device) for _ in range(world_size)
        ]
        addresses = tuple(part.data_ptr() for part in parts)
        return [
            cls(rank=rank, bytes=part, addresses=addresses, handle=parts)
            for rank, part in enumerate(parts)
        ]
