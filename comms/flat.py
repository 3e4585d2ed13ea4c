"""The flat dispatcher: every rank talks to every rank directly, nodes or not.

Legend: T my tokens, H hidden, K top-k, R received rows, P pairs.

    dispatch   one packed row per (token, rank)                        one exchange over the world
    combine    "node", "fixed": one 4-byte partial sum per (token, rank)   one exchange
               "exact": one row per (token, k) in the model's dtype
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from comms.base import BaseDispatcher, Booked
from comms.codec import WireFormat
from comms.codecs import CODECS
from comms.dispatcher import DispatchHandle, Received
from comms.reduction import Reduction
from comms.routes import (
    RowRoute,
    pair_positions,
    pairs_per_segment,
    route_pairs,
    route_rows,
    weighted_sum,
)
from comms.sizes import as_bytes


@dataclass(frozen=True, kw_only=True)
class FlatHandle(DispatchHandle):
    """sent: my rows by destination rank. ranks_TK: the rank of each entry. recv_counts: rows that
    I received, by source rank; local slots, weights and ranges of those rows."""

    wire: WireFormat
    reduction: Reduction
    sent: RowRoute
    ranks_TK: Tensor
    recv_counts: list[int]
    local_slots_RK: Tensor
    weights_RK: Tensor
    range_R: Tensor | None


class FlatDispatcher(BaseDispatcher):
    """TokenDispatcher over one world exchange. Bit-equal to the hierarchical one."""

    def start_dispatch(
        self, x_TH: Tensor, slots_TK: Tensor, weights_TK: Tensor, range_T: Tensor | None = None
    ) -> "RowsInFlight":
        wire = self._check(x_TH, slots_TK, weights_TK, range_T)
        ranks_TK = slots_TK.div(self.slots_per_rank, rounding_mode="floor")
        sent = route_rows(ranks_TK, self.topology.world_size)
        rows = self._packed(wire, x_TH, slots_TK, weights_TK, range_T)
        exchange = self._start("dispatch", self.groups.world, sent.of_chunks(rows))
        handle = FlatHandle(
            num_pairs=(),
            weights_TK=weights_TK,
            range_T=range_T,
            wire=wire,
            reduction=self._reduction(x_TH.dtype),
            sent=sent,
            ranks_TK=ranks_TK,
            recv_counts=[],
            local_slots_RK=slots_TK[:0],
            weights_RK=weights_TK[:0],
            range_R=None,
        )
        return RowsInFlight(self, handle, exchange)

    def dispatch_again(self, x_TH: Tensor, handle: DispatchHandle) -> Tensor:
        handle = self._own(handle)
        packed = CODECS[handle.wire.codec].encode(x_TH)
        parts = [packed[rows].reshape(-1) for rows in handle.sent.parts]
        arrived = self._exchange("dispatch", self.groups.world, parts)
        return handle.wire.unpack_x(torch.cat(arrived).view(-1, packed.shape[1]))

    def start_combine(self, outputs: Sequence[Tensor], handle: DispatchHandle) -> "PartsInFlight":
        handle = self._own(handle)
        self._check_outputs(outputs, handle, handle.wire.dtype)
        (rows,), counts = outputs, handle.recv_counts
        if self.combine_mode == "exact":
            counts = pairs_per_segment(handle.local_slots_RK, counts)
        else:
            positions_RK = pair_positions(handle.local_slots_RK)
            rows = handle.reduction.partial(rows, positions_RK, handle.weights_RK, handle.range_R)
        messages = [as_bytes(part) for part in torch.split(rows, counts)]
        return PartsInFlight(self, handle, self._start("combine", self.groups.world, [messages]))

    def arrive(self, messages: list[Tensor], handle: FlatHandle) -> tuple[Received, FlatHandle]:
        """What the ranks sent me, and the handle that knows of it."""
        wire = handle.wire
        rows_RB = torch.cat(messages).view(-1, wire.row_bytes)
        slots_RK = wire.unpack_slots(rows_RB) - self.rank * self.slots_per_rank
        mine_RK = (slots_RK >= 0) & (slots_RK < self.slots_per_rank)
        local_slots_RK = torch.where(mine_RK, slots_RK, -1)
        received = Received(x_RH=wire.unpack_x(rows_RB), local_slots_RK=local_slots_RK)
        return received, replace(
            handle,
            num_pairs=(int(mine_RK.sum()),),
            recv_counts=[message.numel() // wire.row_bytes for message in messages],
            local_slots_RK=local_slots_RK,
            weights_RK=wire.unpack_weights(rows_RB),
            range_R=wire.unpack_range(rows_RB) if wire.with_range else None,
        )

    def finish(self, messages: list[Tensor], handle: FlatHandle) -> Tensor:
        """out_TH from what the ranks sent home."""
        dtype, num_tokens = handle.wire.dtype, len(handle.weights_TK)
        if self.combine_mode == "exact":
            pairs_PH = torch.cat(messages).view(dtype).view(-1, self.hidden)
            route = route_pairs(handle.ranks_TK, self.topology.world_size)
            return weighted_sum(pairs_PH, route.positions_RK, handle.weights_TK).to(dtype)
        reduction, topology = handle.reduction, self.topology
        partials = [
            m.view(reduction.partial_dtype).view(-1, reduction.partial_columns) for m in messages
        ]
        everything = torch.arange(num_tokens)
        sums = []
        for node in range(topology.num_nodes):
            first, last = topology.node_ranks(node)[0], topology.node_ranks(node)[-1] + 1
            of_node = partials[first:last]
            sum_TH = reduction.node_sum(of_node, handle.sent.parts[first:last], num_tokens)
            sums.append(reduction.decode(reduction.encode(sum_TH), num_tokens))
        rows = [everything] * topology.num_nodes
        return reduction.total(sums, rows, handle.range_T, num_tokens)

    def _own(self, handle: DispatchHandle) -> FlatHandle:
        if not isinstance(handle, FlatHandle):
            raise ValueError(f"not a handle of this dispatcher: {type(handle).__name__}")
        return handle


class RowsInFlight:
    """PendingDispatch: packed rows on their way to every rank."""

    def __init__(self, dispatcher: FlatDispatcher, handle: FlatHandle, exchange: Booked) -> None:
        self.handle, self._dispatcher, self._exchange = handle, dispatcher, exchange

    def __iter__(self) -> Iterator[Received]:
        received, self.handle = self._dispatcher.arrive(self._exchange.wait(), self.handle)
        yield received


class PartsInFlight:
    """PendingCombine: partial sums or pairs on their way home."""

    def __init__(self, dispatcher: FlatDispatcher, handle: FlatHandle, exchange: Booked) -> None:
        self._dispatcher, self._handle, self._exchange = dispatcher, handle, exchange

    def wait(self) -> Tensor:
        return self._dispatcher.finish(self._exchange.wait(), self._handle)
