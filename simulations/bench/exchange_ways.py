"""The ways between GPUs that a bench compares: memory that they share, or each a node of its own over NCCL.

Legend: T tokens of a rank, H hidden, K top-k, R received rows, P pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from comms.store import PrefixStore, Store
from comms.symmetric_layout import DispatchDtype, SumMode, SymmetricLayout
from comms.topology import Topology
from simulations.bench.exchange_workload import GpuWorkload

TIMEOUT_S = 20.0


class Dispatcher(Protocol):
    """What those of one node and of several have in common; handles go back to who made them."""

    @property
    def layout(self) -> SymmetricLayout: ...

    def expect(self, max_tokens: int | None) -> int: ...

    def dispatch(
        self, x_TH: Tensor, slots_TK: Tensor, weights_TK: Tensor, range_T: Tensor | None = None, /
    ) -> tuple[Any, Any]: ...

    def combine(self, y_PH: Tensor, place_RK: Tensor | None, handle: Any) -> Tensor: ...

    def check(self) -> None: ...

    def close(self) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Ways:
    """Dispatchers, and what their results are called."""

    float8: Dispatcher
    bfloat16: Dispatcher
    fixed: Dispatcher
    prefix: str = ""

    @classmethod
    def made_by(
        cls, make: Callable[[DispatchDtype, SumMode], Dispatcher], prefix: str = ""
    ) -> Ways:
        return cls(
            float8=make("float8", "node"),
            bfloat16=make("bfloat16", "node"),
            fixed=make("float8", "fixed"),
            prefix=prefix,
        )

    @property
    def all(self) -> tuple[Dispatcher, Dispatcher, Dispatcher]:
        return self.float8, self.bfloat16, self.fixed


def of_one_node(workload: GpuWorkload, store: Store, rank: int, device: torch.device) -> Ways:
    """Over shared memory. Collective; raises RuntimeError where the GPUs have none."""
    from comms.symmetric import SymmetricDispatcher

    def dispatcher(dtype: DispatchDtype, combine: SumMode) -> Dispatcher:
        return SymmetricDispatcher.connect(
            workload.layout(dtype, combine), store, rank, device,
            timeout_s=TIMEOUT_S, programs=workload.programs,
        )  # fmt: skip

    return Ways.made_by(dispatcher)


def of_nodes(workload: GpuWorkload, store: Store, rank: int, device: torch.device) -> Ways:
    """Over NCCL, each rank a node. Collective."""
    from comms.gpu_dispatcher import connect_dispatcher

    topology = Topology(num_nodes=workload.ranks, ranks_per_node=1)

    def dispatcher(dtype: DispatchDtype, combine: SumMode) -> Dispatcher:
        return connect_dispatcher(
            topology, workload.layout(dtype, combine), PrefixStore(f"{dtype}/{combine}", store),
            rank, device, timeout_s=TIMEOUT_S, programs=workload.programs,
        )  # fmt: skip

    return Ways.made_by(dispatcher, "nodes_")
