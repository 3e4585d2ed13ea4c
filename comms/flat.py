"""The flat dispatcher: every rank talks to every rank directly, nodes or not.

Legend: T my tokens, H hidden, K top-k, R received rows, P pairs.

    dispatch   one packed row per (token, rank)                        one exchange over the world
    combine    "node", "fixed": one 4-byte partial sum per (token, rank)   one exchange
               "exact": one row per (token, k) in the model's dtype
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from comms.base import BaseDispatcher, Booked
from comms.codec import WireFormat
from comms.dispatcher import DispatchHandle, Received
from comms.reduction import Reduction
from comms.routes import (
    Indices,
    Pairs,
    RowRoute,
    joined_rows,
    route_rows,
    sums_of_segments,
)
from comms.sizes import as_bytes


@dataclass(frozen=True, kw_only=True)
class FlatHandle(DispatchHandle):
    """sent: my rows by destination rank. ranks_TK: the rank of each entry. recv_counts: rows that
    I received, by source rank; the ranges of those rows and their pairs on this rank."""

    wire: WireFormat
    reduction: Reduction
    sent: RowRoute
    ranks_TK: Indices
    recv_counts: list[int]
    pairs: Pairs | None
    range_R: Tensor | None


class FlatDispatcher(BaseDispatcher):
    """TokenDispatcher over one world exchange. Bit-equal to the hierarchical one."""

    def start_dispatch(
        self, x_TH: Tensor, slots_TK: Tensor, weights_TK: Tensor, range_T: Tensor | None = None
    ) -> "RowsInFlight":
        wire = self._check(x_TH, slots_TK, weights_TK, range_T)
        ranks_TK = slots_TK.numpy() // self.slots_per_rank
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
            pairs=None,
            range_R=None,
        )
        return RowsInFlight(self, handle, exchange)

    def dispatch_again(self, x_TH: Tensor, handle: DispatchHandle) -> Tensor:
        handle = self._own(handle)
        payload_TB = handle.wire.encode(x_TH).numpy()
        arrived = self._exchange("dispatch", self.groups.world, handle.sent.messages(payload_TB))
        rows = [message.numpy().reshape(-1, payload_TB.shape[1]) for message in arrived]
        return handle.wire.decode(joined_rows(rows))

    def start_combine(self, outputs: Sequence[Tensor], handle: DispatchHandle) -> "PartsInFlight":
        handle = self._own(handle)
        self._check_outputs(outputs, handle, handle.wire.dtype)
        (rows,), counts, pairs = outputs, handle.recv_counts, handle.pairs
        assert pairs is not None, "set when the tokens arrived"
        if self.combine_mode == "exact":
            counts = sums_of_segments(np.bincount(pairs.rows_P, minlength=pairs.num_rows), counts)
        else:
            rows = handle.reduction.partial(rows, pairs, handle.range_R)
        messages = [as_bytes(part) for part in torch.split(rows, counts)]
        return PartsInFlight(self, handle, self._start("combine", self.groups.world, [messages]))

    def arrive(self, messages: list[Tensor], handle: FlatHandle) -> tuple[Received, FlatHandle]:
        """What the ranks sent me, and the handle that knows of it."""
        wire = handle.wire
        arrived = [wire.records(message) for message in messages]
        tail_R = joined_rows([records["tail"] for records in arrived])
        local_slots_RK = self._local_slots(tail_R["slots"])
        pairs = Pairs.of(local_slots_RK, tail_R["weights"])
        received = Received(
            x_RH=wire.decode(joined_rows([records["payload"] for records in arrived])),
            local_slots_RK=torch.from_numpy(local_slots_RK),
        )
        return received, replace(
            handle,
            num_pairs=(len(pairs),),
            recv_counts=[len(records) for records in arrived],
            pairs=pairs,
            range_R=torch.from_numpy(tail_R["range"]) if wire.with_range else None,
        )

    def finish(self, messages: list[Tensor], handle: FlatHandle) -> Tensor:
        """out_TH from what the ranks sent home."""
        num_tokens = len(handle.weights_TK)
        if self.combine_mode == "exact":
            return self._sum_exact(messages, handle.ranks_TK, handle.weights_TK, handle.wire.dtype)
        reduction, topology = handle.reduction, self.topology
        partials = self._partials(messages, reduction)
        everything = np.arange(num_tokens)
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
