"""The dispatcher of GPUs of several nodes: one copy of a token to each node, one sum back from each.

Legend: T my tokens, H hidden, K top-k, M nodes, R ranks of a node, N rows per source, V = M * N rows on
my rail, P pairs.

    dispatch   pack      my rows, quantised once, as records                       comms/kernels/rail.py
               rail      to the ranks with my local rank on all nodes              comms/rail.py
               forward   what came, as it is, to the ranks of this node that need it (NVLink)
    combine    reduce    one sum per row and rank, to the rank that forwarded it   comms/symmetric.py
               rail      one sum per row and node, home
               add       nodes in node order

Bits are those of `comms/reference.py`: combine "node" adds a node's ranks in fp32 and rounds once,
"fixed" adds integers, which cross in 32 bits. Shapes depend on N alone, nothing waits for the host, and a
step is one CUDA graph. The price: N rows of every rank cross to every node, also those that it does not
need. `exact_above`: from so many rows on, counts cross first and then exactly what a node needs; for
that the host waits for the device once a dispatch, so such a step cannot be captured.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from comms.kernels.rail import add_nodes, pack_rows
from comms.node_counts import Counts
from comms.rail import Rail
from comms.rail_record import RailRecord
from comms.rail_watch import Progress, RailWatch
from comms.symmetric import PendingRows, PendingSums, SymmetricDispatcher
from comms.symmetric_types import Received, SymmetricHandle, check_arguments, check_tensor

_PART = 1024  # channels that a program adds up


@dataclass(frozen=True, kw_only=True)
class NodesHandle:
    """From a dispatch to its combine. counts: None where all N rows of all cross."""

    slots_TK: Tensor
    range_T: Tensor | None
    num_rows: int
    counts: Counts | None
    node: SymmetricHandle


class NodesDispatcher:
    """Of one rank. `node`: its part inside the node, whose layout has room for M times as many rows, and
    is `of_several`. Raises what `SymmetricDispatcher` does; `check` names late nodes too.
    """

    def __init__(
        self,
        node: SymmetricDispatcher,
        rail: Rail,
        progress: Progress | None = None,
        watch: RailWatch | None = None,
        *,
        exact_above: int | None = None,
    ) -> None:
        layout = node.layout
        if not layout.of_several or layout.capacity % rail.size:
            raise ValueError(f"a layout of {rail.size} nodes is of_several, got {layout}")
        self.node, self.rail, self.layout, self.exact_above = node, rail, layout, exact_above
        self.record, self.device = RailRecord(layout), node.memory.device
        self.progress, self._watch = progress or Progress(self.device), watch
        self.expect(None)
        self._constants = {
            "NODES": rail.size,
            "SLOTS_PER_NODE": layout.slots_per_rank * layout.world_size,
            "H": layout.hidden,
            "K": layout.num_topk,
            "PADDED_K": 1 << (layout.num_topk - 1).bit_length(),
            "enable_fp_fusion": False,
        }

    @property
    def turn(self) -> int:
        """Which buffers the next dispatch uses, the same on all ranks."""
        return self.node.turn

    @turn.setter
    def turn(self, turn: int) -> None:
        self.node.turn = turn

    def expect(self, max_tokens: int | None) -> int:
        """As that of `SymmetricDispatcher`: sets N."""
        capacity = self.layout.capacity // self.rail.size
        num_rows = capacity if max_tokens is None else max(1, max_tokens)
        if num_rows > capacity:
            raise ValueError(f"room for {capacity} tokens a rank, expected {num_rows}")
        self.num_rows = num_rows
        return self.node.expect(self.rail.size * num_rows)

    def start_dispatch(
        self, x_TH: Tensor, slots_TK: Tensor, weights_TK: Tensor, range_T: Tensor | None = None
    ) -> PendingNodeRows:
        """Send each token once to every node that hosts one of its slots; arguments as there."""
        self.check()
        layout, record, num_rows = self.layout, self.record, self.num_rows
        check_arguments(layout, num_rows, x_TH, slots_TK, weights_TK, range_T)
        counts = self._counts(slots_TK)
        shape = (2, self.rail.size, num_rows, record.words)
        records = torch.empty(shape, dtype=torch.int32, device=self.device)
        pack_rows[(num_rows,)](
            records, x_TH, slots_TK, weights_TK, weights_TK if range_T is None else range_T,
            counts.places_MN if counts else slots_TK, *self.progress.tensors, len(x_TH), num_rows,
            counts.num_sent if counts else (self.rail.size - 1) * num_rows, self.rail.idx,
            PADDED_H=1 << (layout.hidden - 1).bit_length(), RECORD=record.words,
            SCALES_AT=record.scales_at, SLOTS_AT=record.slots_at,
            FLOAT8=layout.dispatch_dtype == "float8", RANGED=layout.combine == "fixed",
            PLACED=counts is not None, num_warps=8, **self._constants,
        )  # fmt: skip
        here, sent = records.unbind()
        if counts:
            self.rail.start(counts.arrived(here), counts.sent(sent))
        else:
            self.rail.start(here.unbind(), sent.unbind())
        return PendingNodeRows(self, records, slots_TK, range_T, counts)

    def dispatch(
        self, x_TH: Tensor, slots_TK: Tensor, weights_TK: Tensor, range_T: Tensor | None = None
    ) -> tuple[Received, NodesHandle]:
        pending = self.start_dispatch(x_TH, slots_TK, weights_TK, range_T)
        handle = pending.forward(waits=True)
        return pending.wait(), handle

    def start_combine(
        self, y_PH: Tensor, place_RK: Tensor | None, handle: NodesHandle
    ) -> PendingNodeSums:
        """Send one sum per row and rank to the rank that forwarded it; arguments as there."""
        return PendingNodeSums(self, handle, self.node.start_combine(y_PH, place_RK, handle.node))

    def combine(
        self,
        y_PH: Tensor,
        place_RK: Tensor | None,
        handle: NodesHandle,
        extra_TH: Tensor | None = None,
    ) -> Tensor:
        """out_TH bfloat16, plus extra_TH."""
        pending = PendingNodeSums(self, handle, self.node.combine(y_PH, place_RK, handle.node))
        pending.send()
        return pending.wait(extra_TH)

    def _counts(self, slots_TK: Tensor) -> Counts | None:
        """Of rows that cross, where they are to be exact."""
        if self.exact_above is None or self.num_rows < self.exact_above:
            return None
        slots_per_node = self._constants["SLOTS_PER_NODE"]
        counts = Counts.exchange(slots_TK, self.num_rows, slots_per_node, self.rail, self.progress)
        self.check()  # after a failure the numbers mean nothing
        return counts

    def check(self) -> None:
        """Raise CommTimeout or CommError for ranks of this node and of my rail. Needs no synchronisation."""
        if self._watch is not None:
            self._watch.check()
        self.node.check()

    @property
    def bytes_sent(self) -> dict[str, int]:
        """{"intra_node": ..., "inter_node": ...} since the start: rows, sums and what goes with them, needed
        or not; signals and counts not. Waits for the device."""
        return {**self.node.bytes_sent, "inter_node": int(self.progress.count[1])}

    def forget_bytes(self) -> None:
        """Count from zero again."""
        self.node.forget_bytes()
        self.progress.count[1:].zero_()

    def close(self) -> None:
        """Call it when all ranks are past their last exchange."""
        if self._watch is not None:
            self._watch.close()
        self.rail.abort()


class PendingNodeRows:
    """Rows on their way: over the rail, then inside the node."""

    def __init__(
        self,
        dispatcher: NodesDispatcher,
        records: Tensor,
        slots_TK: Tensor,
        range_T: Tensor | None,
        counts: Counts | None,
    ) -> None:
        self._dispatcher, self._records = dispatcher, records
        self._slots_TK, self._range_T, self._counts = slots_TK, range_T, counts
        self._pending: PendingRows | None = None

    def forward(self, *, waits: bool = False) -> NodesHandle:
        """Once the rail's rows are here. `waits`: the same kernel waits for those of the node's ranks."""
        d, num_rows = self._dispatcher, self._records.shape[2]
        d.rail.finish()
        self._pending = d.node.start_forward(
            self._records[0].flatten(0, 1), num_rows, d.rail.idx, d.progress.tensors,
            self._counts.arrived_M if self._counts else None, waits=waits,
        )  # fmt: skip
        return NodesHandle(
            slots_TK=self._slots_TK,
            range_T=self._range_T,
            num_rows=num_rows,
            counts=self._counts,
            node=self._pending.handle,
        )

    def wait(self) -> Received:
        """Kernels launched from here on find all rows there; after `forward`."""
        assert self._pending is not None, "forward comes first"
        return self._pending.wait()


class PendingNodeSums:
    """Sums on their way home: inside the node, then over the rail."""

    def __init__(
        self, dispatcher: NodesDispatcher, handle: NodesHandle, sums: PendingSums | Tensor
    ) -> None:
        self._dispatcher, self._handle, self._sums = dispatcher, handle, sums

    def send(self) -> None:
        """Once this node's sums are here; V rows."""
        d, counts = self._dispatcher, self._handle.counts
        d.check()
        sums = self._sums if isinstance(self._sums, Tensor) else self._sums.wait()
        shape = (d.rail.size, self._handle.num_rows, d.record.sum_columns)
        self._mine, self._theirs = sums.view(shape), torch.empty_like(sums).view(shape)
        if counts:
            d.rail.start(counts.sent(self._theirs), counts.arrived(self._mine))
        else:
            d.rail.start(self._theirs.unbind(), self._mine.unbind())

    def wait(self, extra_TH: Tensor | None = None) -> Tensor:
        """out_TH bfloat16: each token's weighted sum; plus extra_TH, added in bfloat16. After `send`."""
        d, handle = self._dispatcher, self._handle
        shape = (len(handle.slots_TK), d.layout.hidden)
        out_TH = torch.empty(shape, dtype=torch.bfloat16, device=d.device)
        if extra_TH is not None:
            check_tensor("extra_TH", extra_TH, (torch.bfloat16,), shape)
        d.rail.finish()
        channels = min(_PART, 1 << (d.layout.hidden - 1).bit_length())
        blocks = -(-d.layout.hidden // channels)
        add_nodes[(max(1, shape[0]) * blocks,)](
            out_TH, out_TH if extra_TH is None else extra_TH, handle.slots_TK,
            self._mine if handle.range_T is None else handle.range_T, self._mine, self._theirs,
            handle.counts.places_MN if handle.counts else handle.slots_TK, *d.progress.tensors,
            shape[0], handle.num_rows,
            handle.counts.num_came if handle.counts else (d.rail.size - 1) * handle.num_rows,
            d.rail.idx, BLOCK_H=channels, COLUMNS=d.record.sum_columns,
            FIXED=d.layout.combine == "fixed", EXTRA=extra_TH is not None,
            PLACED=handle.counts is not None, num_warps=4, **d._constants,
        )  # fmt: skip
        return out_TH
