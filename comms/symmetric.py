"""The dispatcher of GPUs of one node: tokens and sums are stored straight into each other's memory.

Legend: T my tokens, H hidden, K top-k, W ranks, N rows per source, R = W * N received rows, P pairs,
B blocks of 128 channels.

What goes where and comes back is that of `comms/dispatcher.py`, and the bits are those of
`comms/reference.py` with one rank to a node: combine "node" rounds one sum per rank to bfloat16,
"fixed" adds integers. Here shapes are static, so that a step is one CUDA graph: as in
`comms/low_latency.py` the address of a row, source rank * N + token, is its place at every expert; rows
that nobody sent have the slots -1. N is what `expect` was told last, the same on all ranks.

    received, handle = dispatcher.dispatch(x_TH, slots_TK, weights_TK)
    ...                                             # sort received.local_slots_RK, compute y_PH
    out_TH = dispatcher.combine(y_PH, place_RK, handle, extra_TH)

Each is one kernel. In two halves, `start_dispatch` and `wait`, other work can be put between.

Nothing here reads what the device computed. A peer that does not come in time is seen at the next
`check()` (every start does one, and it costs no synchronisation): CommTimeout. The results of that step
are void, and the dispatcher with them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from comms.rail_record import RailRecord
from comms.store import Store
from comms.symmetric_kernels import ExchangeKernels
from comms.symmetric_layout import BUFFERS, SymmetricLayout
from comms.symmetric_memory import SymmetricMemory
from comms.symmetric_report import Report
from comms.symmetric_types import (
    Received,
    SymmetricHandle,
    check_arguments,
    check_tensor,
)
from comms.where import Where

__all__ = ["PendingRows", "PendingSums", "Received", "SymmetricDispatcher", "SymmetricHandle"]


class SymmetricDispatcher:
    """Raises ValueError for tensors that cannot be, CommTimeout and CommError as in `check`.

    timeout_s: how long a kernel waits for a peer. where: the step and layer that errors name. programs:
    of a kernel at most, None for what is fastest; with 24 of them the GPU has room for other work. ranks:
    of the world, by rank of the node, as errors name them; None where there is one node.
    """

    def __init__(
        self,
        layout: SymmetricLayout,
        memory: SymmetricMemory,
        *,
        where: Where | None = None,
        timeout_s: float = 60.0,
        programs: int | None = None,
        ranks: Sequence[int] | None = None,
    ) -> None:
        memory.check_fits(layout.world_size, layout.num_bytes)
        self.layout, self.memory, self.rank = layout, memory, memory.rank
        self.where = where or Where()
        self.num_rows = layout.capacity
        self.turn = 0
        """Of the next dispatch: which of the buffers it uses, the same on all ranks."""
        self.report = Report(
            self.rank, ranks or range(layout.world_size), memory.device, self.where, timeout_s
        )
        self._kernels = ExchangeKernels(layout, memory, self.report, programs)

    @classmethod
    def connect(
        cls,
        layout: SymmetricLayout,
        store: Store,
        rank: int,
        device: torch.device,
        *,
        where: Where | None = None,
        timeout_s: float = 60.0,
        programs: int | None = None,
    ) -> SymmetricDispatcher:
        """Collective over the ranks of a node; each is a process with a GPU of its own."""
        memory = SymmetricMemory.connect(store, rank, layout.world_size, layout.num_bytes, device)
        return cls(layout, memory, where=where, timeout_s=timeout_s, programs=programs)

    def expect(self, max_tokens: int | None) -> int:
        """No rank has more tokens in the coming step, the same number everywhere (None: unknown).

        It sets N: a graph captured now has it for good. Returns 1, the number of micro-batches.
        """
        num_rows = self.layout.capacity if max_tokens is None else max(1, max_tokens)
        if num_rows > self.layout.capacity:
            raise ValueError(f"room for {self.layout.capacity} tokens a rank, expected {num_rows}")
        self.num_rows = num_rows
        return 1

    def start_dispatch(
        self,
        x_TH: Tensor,
        slots_TK: Tensor,
        weights_TK: Tensor,
        range_T: Tensor | None = None,
        *,
        waits: bool = False,
    ) -> PendingRows:
        """Store each token once on every rank that hosts one of its slots.

        x_TH bfloat16; slots_TK int32 or int64 of global slots, -1 = none; weights_TK and range_T fp32,
        the latter for combine "fixed". T <= N. `waits`: the same kernel waits for the others' rows.
        """
        self.check()
        num_rows = self.num_rows
        check_arguments(self.layout, num_rows, x_TH, slots_TK, weights_TK, range_T)
        handle = self._next(slots_TK, range_T)
        self._kernels.dispatch(x_TH, weights_TK, handle, waits=waits)
        return PendingRows(self._kernels, handle, is_here=waits or not self._kernels.signals)

    def dispatch(
        self,
        x_TH: Tensor,
        slots_TK: Tensor,
        weights_TK: Tensor,
        range_T: Tensor | None = None,
    ) -> tuple[Received, SymmetricHandle]:
        """start_dispatch and its wait, in one kernel."""
        pending = self.start_dispatch(x_TH, slots_TK, weights_TK, range_T, waits=True)
        return pending.wait(), pending.handle

    def start_forward(
        self,
        records: Tensor,
        rows_of_source: int,
        node: int,
        told: tuple[Tensor, Tensor],
        arrived_M: Tensor | None = None,
        *,
        waits: bool = False,
    ) -> PendingRows:
        """Like start_dispatch, of rows that came packed from all nodes, V = `num_rows` of them.

        records: int32 [V, words], see `comms/rail_record.py`, rows_of_source of each node, of which only
        the first arrived_M (int32; None: all) are there; node: mine. told: see `comms/rail_watch.py`.
        The handle's slots are those of the records, among this node's.
        """
        self.check()
        shape, words = (self.num_rows, self.layout.num_topk), RailRecord(self.layout).words
        check_tensor("records", records, (torch.int32,), (self.num_rows, words))
        slots_VK = torch.empty(shape, dtype=torch.int32, device=records.device)
        handle = self._next(slots_VK)
        self._kernels.forward(records, rows_of_source, node, told, arrived_M, handle, waits=waits)
        return PendingRows(self._kernels, handle, is_here=waits or not self._kernels.signals)

    def start_combine(
        self, y_PH: Tensor, place_RK: Tensor | None, handle: SymmetricHandle
    ) -> PendingSums:
        """Send one sum per token and rank home.

        y_PH bfloat16: unweighted outputs, the one of pair (r, k) at place_RK[r, k], int32, -1 where
        there is none. Without places (combine "node" only) y is [R, H]: sums per row, weighted already.
        It may be in use until the kernels of `wait` ran.
        """
        pending = self._outputs(y_PH, place_RK, handle)
        if self.layout.world_size > 1:
            pending.launch(sends=True, adds=False)
        return pending

    def combine(
        self,
        y_PH: Tensor,
        place_RK: Tensor | None,
        handle: SymmetricHandle,
        extra_TH: Tensor | None = None,
    ) -> Tensor:
        """start_combine and its wait, in one kernel, which adds some sums while others are sent."""
        return self._outputs(y_PH, place_RK, handle).launch(
            sends=True, adds=True, extra_TH=extra_TH
        )

    def _outputs(
        self, y_PH: Tensor, place_RK: Tensor | None, handle: SymmetricHandle
    ) -> PendingSums:
        self.check()
        self._check_outputs(y_PH, place_RK, handle)
        return PendingSums(self._kernels, y_PH, place_RK, handle)

    def check(self) -> None:
        """Raise CommTimeout if a kernel gave up on a peer, CommError if ranks expected different
        numbers of tokens; both name the first failure. Needs no synchronisation, sees what is done."""
        self.report.check(self.num_rows)

    @property
    def bytes_sent(self) -> dict[str, int]:
        """{"intra_node": ...} since the start: what kernels stored into other ranks' memory, slots of rows that
        nobody sent among it, signals not. Waits for the device."""
        return {"intra_node": self._kernels.bytes_sent}

    def forget_bytes(self) -> None:
        """Count from zero again."""
        self._kernels.forget_bytes()

    def close(self) -> None:
        """Nothing is held but memory."""

    # -- what is where -----------------------------------------------------------------------

    def _next(self, slots_TK: Tensor, range_T: Tensor | None = None) -> SymmetricHandle:
        """Of a dispatch that begins, which takes the other buffers than the one before."""
        buffer = self.turn % BUFFERS
        self.turn += 1
        return SymmetricHandle(
            buffer=buffer,
            num_rows=self.num_rows,
            slots_TK=slots_TK,
            range_T=range_T,
            received=self._received(buffer, self.num_rows),
        )

    def _received(self, buffer: int, num_rows: int) -> Received:
        layout = self.layout
        rows, hidden, k = layout.world_size * num_rows, layout.hidden, layout.num_topk
        offsets = layout.offsets(buffer)

        def region(i: int, columns: int, dtype: torch.dtype) -> Tensor:
            size = rows * columns * dtype.itemsize
            taken = self.memory.bytes[offsets[i] : offsets[i] + size]
            return taken.view(dtype).view(rows, columns)

        float8, fixed = layout.dispatch_dtype == "float8", layout.combine == "fixed"
        return Received(
            x_RH=region(0, hidden, layout.row_dtype),
            scale_RB=region(1, hidden // 128, torch.float32) if float8 else None,
            local_slots_RK=region(2, k, torch.int32),
            weights_RK=region(3, k, torch.float32),
            range_R=region(4, 1, torch.float32).view(rows) if fixed else None,
        )

    # -- checks ------------------------------------------------------------------------------

    def _check_outputs(
        self, y_PH: Tensor, place_RK: Tensor | None, handle: SymmetricHandle
    ) -> None:
        rows = self.layout.world_size * handle.num_rows
        if place_RK is not None:
            check_tensor("place_RK", place_RK, (torch.int32,), (rows, self.layout.num_topk))
        elif self.layout.combine == "fixed":
            raise ValueError('combine "fixed" adds up pairs itself: it needs place_RK')
        shape = (rows if place_RK is None else len(y_PH), self.layout.hidden)
        check_tensor("y", y_PH, (torch.bfloat16,), shape)


class PendingRows:
    """Rows on their way here."""

    def __init__(self, kernels: ExchangeKernels, handle: SymmetricHandle, *, is_here: bool) -> None:
        self._kernels, self.handle, self._is_here = kernels, handle, is_here

    def wait(self) -> Received:
        """Kernels launched from here on find all rows there."""
        if not self._is_here:
            self._kernels.wait(self.handle)
            self._is_here = True
        return self.handle.received


class PendingSums:
    """Sums on their way home."""

    def __init__(
        self,
        kernels: ExchangeKernels,
        y_PH: Tensor,
        place_RK: Tensor | None,
        handle: SymmetricHandle,
    ) -> None:
        self._kernels, self._y_PH, self._place_RK, self._handle = kernels, y_PH, place_RK, handle

    def wait(self, extra_TH: Tensor | None = None) -> Tensor:
        """out_TH bfloat16: each token's weighted sum; plus extra_TH, added in bfloat16. Call it once."""
        return self.launch(sends=False, adds=True, extra_TH=extra_TH)

    def launch(self, *, sends: bool, adds: bool, extra_TH: Tensor | None = None) -> Tensor:
        """out_TH, which only a kernel that adds has filled; [T, sum_columns] in a node of several."""
        if extra_TH is not None:
            shape = (len(self._handle.slots_TK), self._kernels.layout.hidden)
            check_tensor("extra_TH", extra_TH, (torch.bfloat16,), shape)
        return self._kernels.combine(
            self._y_PH, self._place_RK, self._handle, extra_TH, sends=sends, adds=adds
        )
