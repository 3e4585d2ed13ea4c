"""NCCL's all-to-all: what the stores of `comms/symmetric.py` are measured beside.

The process group is built explicitly over a prefix of the store: no default group, nothing lazy.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from comms.store import PrefixStore, Store


class NcclExchange:
    """Even all-to-all between GPUs; collective constructor. Raises RuntimeError without NCCL."""

    def __init__(
        self,
        store: Store,
        rank: int,
        world_size: int,
        device: torch.device,
        *,
        name: str = "nccl",
        timeout_s: float = 60.0,
    ) -> None:
        try:
            from torch.distributed import ProcessGroupNCCL  # type: ignore[attr-defined,unused-ignore]
        except ImportError:
            raise RuntimeError("this torch was built without NCCL") from None
        options = ProcessGroupNCCL.Options()
        options._timeout = timedelta(seconds=timeout_s)
        self._group: Any = ProcessGroupNCCL(PrefixStore(name, store), rank, world_size, options)
        self._device = device

    def all_to_all(self, out: Tensor, x: Tensor) -> None:
        """out[i] = what rank i has in x[my rank], on the current stream; [W, ...] both."""
        self._group.alltoall_base(out, x, [], []).wait()

    def close(self) -> None:
        """Call it when all ranks are past their last exchange."""
        self._group.abort()
