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

import numpy as np
import torch
from torch import Tensor

from comms.kernels.combine import combine_rows
from comms.kernels.dispatch import dispatch_rows, wait_for_rows
from comms.kernels.rail import forward_rows
from comms.rail_record import RailRecord
from comms.store import Store
from comms.symmetric_layout import BUFFERS, PROGRAMS, SymmetricLayout
from comms.symmetric_memory import SymmetricMemory
from comms.symmetric_report import Report
from comms.symmetric_tiles import Tiles
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
        if layout.world_size != memory.world_size or memory.bytes.numel() < layout.num_bytes:
            raise ValueError(
                f"a layout of {layout.world_size} ranks and {layout.num_bytes} bytes does not fit "
                f"memory of {memory.world_size} ranks and {memory.bytes.numel()} bytes"
            )
        self.layout, self.memory, self.rank = layout, memory, memory.rank
        self.where = where or Where()
        self.num_rows = layout.capacity
        device = memory.device
        is_gpu = device.type == "cuda"
        # On a CPU kernels are interpreted: ranks of one process, one after the other.
        self._signals = is_gpu and layout.world_size > 1
        multiprocessors = (
            torch.cuda.get_device_properties(device).multi_processor_count if is_gpu else 1
        )
        self.tiles = Tiles(layout, multiprocessors, programs)
        self.turn = 0
        """Of the next dispatch: which of the buffers it uses, the same on all ranks."""
        self._tables = [self._table(buffer) for buffer in range(BUFFERS)]
        # How many signals each program has given, and how many it has waited for, by kind and buffer.
        state = (2, BUFFERS, 2, PROGRAMS)
        self._state = torch.zeros(state, dtype=torch.int64, device=device)
        self.report = Report(
            self.rank, ranks or range(layout.world_size), device, self.where, timeout_s
        )
        limit = np.nextafter(np.float32(2**31 / layout.num_topk), np.float32(0))
        self._constants = {
            "WORLD": layout.world_size,
            "H": layout.hidden,
            "K": layout.num_topk,
            "PADDED_K": 1 << (layout.num_topk - 1).bit_length(),
        }
        self._limit = float(limit)

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
        tile = self.tiles.dispatch(num_rows)
        dispatch_rows[(tile.programs,)](
            x_TH, slots_TK, weights_TK, weights_TK if range_T is None else range_T,
            self._tables[handle.buffer], self._state[0, handle.buffer], self.report.failed,
            self.report.lines[0], len(x_TH), num_rows, self.rank, self.report.deadline_ns,
            SLOTS_PER_RANK=self.layout.slots_per_rank,
            FLOAT8=self.layout.dispatch_dtype == "float8", RANGED=self.layout.combine == "fixed",
            PADDED_H=tile.channels, SIGNALS=self._signals, WAITS=waits, **self._constants, **tile.options,
        )  # fmt: skip
        return PendingRows(self, handle, is_here=waits or not self._signals)

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
        layout, record = self.layout, RailRecord(self.layout)
        shape, num_rows = (self.num_rows, layout.num_topk), self.num_rows
        check_tensor("records", records, (torch.int32,), (num_rows, record.words))
        slots_VK = torch.empty(shape, dtype=torch.int32, device=records.device)
        handle = self._next(slots_VK)
        tile = self.tiles.dispatch(num_rows)
        forward_rows[(tile.programs,)](
            slots_VK, records, slots_VK if arrived_M is None else arrived_M,
            self._tables[handle.buffer], self._state[0, handle.buffer], self.report.failed,
            self.report.lines[0], *told, num_rows, rows_of_source, node, self.rank, self.report.deadline_ns,
            SLOTS_PER_RANK=layout.slots_per_rank, PADDED_WORDS=tile.channels * layout.row_dtype.itemsize // 4,
            RECORD=record.words, SCALES_AT=record.scales_at, SLOTS_AT=record.slots_at,
            FLOAT8=layout.dispatch_dtype == "float8", RANGED=layout.combine == "fixed",
            COUNTED=arrived_M is not None, SIGNALS=self._signals, WAITS=waits, **self._constants,
            **tile.options,
        )  # fmt: skip
        return PendingRows(self, handle, is_here=waits or not self._signals)

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
        return PendingSums(self, y_PH, place_RK, handle)

    def check(self) -> None:
        """Raise CommTimeout if a kernel gave up on a peer, CommError if ranks expected different
        numbers of tokens; both name the first failure. Needs no synchronisation, sees what is done."""
        self.report.check(self.num_rows)

    def close(self) -> None:
        """Nothing is held but memory."""

    # -- what is where -----------------------------------------------------------------------

    def _table(self, buffer: int) -> Tensor:
        """int64 [region, rank]: addresses, on the device."""
        offsets = self.layout.offsets(buffer)
        rows = [[address + offset for address in self.memory.addresses] for offset in offsets]
        return torch.tensor(rows, dtype=torch.int64, device=self.memory.device)

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

    def __init__(
        self, dispatcher: SymmetricDispatcher, handle: SymmetricHandle, *, is_here: bool
    ) -> None:
        self._dispatcher, self.handle, self._is_here = dispatcher, handle, is_here

    def wait(self) -> Received:
        """Kernels launched from here on find all rows there."""
        if not self._is_here:
            d, buffer, num_rows = self._dispatcher, self.handle.buffer, self.handle.num_rows
            wait_for_rows[(d.tiles.dispatch(num_rows).programs,)](
                d._tables[buffer], d._state[0, buffer], d.report.failed, d.report.lines[0], num_rows,
                d.rank, d.report.deadline_ns, WORLD=d.layout.world_size, num_warps=1,
            )  # fmt: skip
            self._is_here = True
        return self.handle.received


class PendingSums:
    """Sums on their way home."""

    def __init__(
        self,
        dispatcher: SymmetricDispatcher,
        y_PH: Tensor,
        place_RK: Tensor | None,
        handle: SymmetricHandle,
    ) -> None:
        self._dispatcher, self._y_PH, self._handle = dispatcher, y_PH, handle
        received = handle.received
        self._is_summed = place_RK is None
        self._places = received.local_slots_RK if place_RK is None else place_RK
        self._ranges = received.weights_RK if received.range_R is None else received.range_R

    def wait(self, extra_TH: Tensor | None = None) -> Tensor:
        """out_TH bfloat16: each token's weighted sum; plus extra_TH, added in bfloat16. Call it once."""
        return self.launch(sends=False, adds=True, extra_TH=extra_TH)

    def launch(self, *, sends: bool, adds: bool, extra_TH: Tensor | None = None) -> Tensor:
        """out_TH, which only a kernel that adds has filled; [T, sum_columns] in a node of several."""
        d, handle, received = self._dispatcher, self._handle, self._handle.received
        num_tokens, buffer, num_rows = len(handle.slots_TK), handle.buffer, handle.num_rows
        is_part, sums = d.layout.of_several, RailRecord(d.layout)
        columns, dtype = d.layout.hidden, torch.bfloat16
        if is_part:
            columns, dtype = sums.sum_columns, sums.sum_dtype
        shape = (num_tokens if adds else 0, columns)
        out_TH = torch.empty(shape, dtype=dtype, device=d.memory.device)
        if extra_TH is not None:
            check_tensor("extra_TH", extra_TH, (torch.bfloat16,), shape)
        sends &= d.layout.world_size > 1
        tile = d.tiles.combine(num_rows)
        is_split = sends and adds and tile.chunk < tile.rounds
        combine_rows[(tile.programs * (1 + is_split),)](
            out_TH, out_TH if extra_TH is None else extra_TH, handle.slots_TK,
            received.weights_RK if handle.range_T is None else handle.range_T,
            self._y_PH, self._places, received.local_slots_RK, received.weights_RK, self._ranges,
            d._tables[buffer], d._state[1, buffer], d.report.failed, d.report.lines[1], num_tokens,
            num_rows, d.rank, tile.chunk, d._limit, d.report.deadline_ns,
            SLOTS_PER_RANK=d.layout.slots_per_rank, SUMMED=self._is_summed,
            FIXED=d.layout.combine == "fixed", EXTRA=extra_TH is not None, SENDS=sends, ADDS=adds,
            SPLIT=is_split, SIGNALS=d._signals, PART=is_part, COLUMNS=columns, BLOCK_H=tile.channels, **d._constants, **tile.options,
        )  # fmt: skip
        return out_TH
