"""The hierarchical dispatcher: one copy of a token per node, one sum back per node.

Legend: T my tokens, H hidden, K top-k, R received rows, V rows on my rail, P pairs, B bytes of a
packed row.

    dispatch   exchange  rail: my token, packed, once to every node it needs
               scatter   node: the same bytes on to every rank of this node that hosts a slot
    combine    reduce    node: each rank's weighted sum goes to the rail rank, which adds them up
               exchange  rail: one row per (token, node) goes home, and is added in node order

A token's *rail rank* at a node is the rank there with the local rank of its origin. The first
stage of other systems, gathering tokens to their rail, costs nothing here: after a reduce-scatter
every token already sits on one. With combine "exact" both ways back carry a row per (token, k).

Nothing is negotiated before: messages describe themselves, and each row carries its *address*,
source rank * stride + token, by which the experts' rank sorts what its node peers forward.

A dispatch comes in one part, or in two when that hides time: rows whose origin is this node go
through `scatter` and their experts while the others are still on the rail; on the way back the
others leave first.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from comms.base import BaseDispatcher, Booked
from comms.codec import WireFormat
from comms.codecs import CODECS
from comms.dispatcher import DispatchHandle, Received
from comms.overlap import OverlapRule
from comms.reduction import Reduction
from comms.routes import (
    Indices,
    Pairs,
    RowRoute,
    inverse,
    joined_rows,
    pairs_by_row,
    route_rows,
    sums_of_segments,
)
from comms.sizes import as_bytes, joined

_NOTHING = torch.empty(0, dtype=torch.uint8)


@dataclass(frozen=True, kw_only=True)
class Part:
    """Rows of some source nodes, on the rail and at the experts of this rank.

    On the rail: rail_counts by source, the local ranks of each entry, `forwarded` by local rank.
    At the experts, recv_counts by local rank; in order of address the addresses and local slots; in
    order of arrival, where each peer's rows are side by side, the ranges and what `pairs` add to.
    order_R leads from the one order to the other.
    """

    sources: tuple[int, ...]
    rail_counts: list[int]
    local_ranks_VK: Indices
    forwarded: RowRoute
    recv_counts: list[int]
    order_R: Indices
    address_R: Indices
    local_slots_RK: Indices
    pairs: Pairs
    range_R: Tensor | None


@dataclass(frozen=True, kw_only=True)
class HierarchicalHandle(DispatchHandle):
    """At the origin: `sent` by node, nodes_TK. Elsewhere: `parts`."""

    wire: WireFormat
    reduction: Reduction
    sent: RowRoute
    nodes_TK: Indices
    parts: tuple[Part, ...]


class HierarchicalDispatcher(BaseDispatcher):
    """TokenDispatcher in two tiers: rails between nodes, shared memory within."""

    addressed = True
    overlap = False  # dispatch in two parts, not one; the same on all ranks

    def expect(self, max_tokens: int | None) -> int:
        if max_tokens is None:
            self.overlap = False
            return 1
        rule = self._overlap_rule
        micro_batches = rule.micro_batches(max_tokens)
        self.overlap = micro_batches == 1 and rule.two_parts(max_tokens)
        return micro_batches

    @cached_property
    def _overlap_rule(self) -> OverlapRule:
        carrier = "bfloat16" if self.combine_mode != "node" else self.combine_dtype
        return OverlapRule(
            links=self.groups.links,
            num_nodes=self.topology.num_nodes,
            dispatch_bytes=CODECS[self.dispatch_dtype].row_bytes(self.hidden, torch.bfloat16),
            combine_bytes=CODECS[carrier].row_bytes(self.hidden, torch.bfloat16),
        )

    @property
    def stride(self) -> int:
        """Address of a rank's first token: rank * stride. Room for as many tokens as int32 has."""
        return (1 << 31) // self.topology.world_size

    def start_dispatch(
        self, x_TH: Tensor, slots_TK: Tensor, weights_TK: Tensor, range_T: Tensor | None = None
    ) -> "TokensInFlight":
        wire = self._check(x_TH, slots_TK, weights_TK, range_T)
        slots_per_node = self.topology.ranks_per_node * self.slots_per_rank
        nodes_TK = slots_TK.numpy() // slots_per_node
        sent = route_rows(nodes_TK, self.topology.num_nodes)
        handle = HierarchicalHandle(
            num_pairs=(),
            weights_TK=weights_TK,
            range_T=range_T,
            wire=wire,
            reduction=self._reduction(x_TH.dtype),
            sent=sent,
            nodes_TK=nodes_TK,
            parts=(),
        )
        own: list[Tensor] = []
        address = self.rank * self.stride
        rows = self._packed(wire, x_TH, slots_TK, weights_TK, range_T, address)
        chunks = _set_aside(sent.of_chunks(rows), self.groups.rail.idx, own)
        exchange = self._start("dispatch/exchange", self.groups.rail, chunks)
        return TokensInFlight(self, handle, exchange, joined(own))

    def dispatch_again(self, x_TH: Tensor, handle: DispatchHandle) -> Tensor:
        handle = self._own(handle)
        payload_TB = handle.wire.encode(x_TH).numpy()
        num_bytes = payload_TB.shape[1]
        messages = handle.sent.messages(payload_TB)
        arrived = self._exchange("dispatch/exchange", self.groups.rail, messages)
        again = []
        for part in handle.parts:
            on_rail = [arrived[source].numpy().reshape(-1, num_bytes) for source in part.sources]
            messages = self._scatter(joined_rows(on_rail), part.forwarded)
            payloads = [message.numpy().reshape(-1, num_bytes) for message in messages]
            again.append(self._hand_over(payloads, part, handle.wire).x_RH)
        return torch.cat(again)

    def start_combine(self, outputs: Sequence[Tensor], handle: DispatchHandle) -> "SumsInFlight":
        handle = self._own(handle)
        self._check_outputs(outputs, handle, handle.wire.dtype)
        rail = self.groups.rail
        to_rail = self._pairs_to_rail if self.combine_mode == "exact" else self._sums_to_rail
        messages = [_NOTHING] * rail.size
        exchange = None
        for part, y_PH in reversed(list(zip(handle.parts, outputs, strict=True))):
            for source, message in zip(part.sources, to_rail(part, y_PH, handle), strict=True):
                messages[source] = message
            if exchange is None:  # rows of other nodes have the longer way: they leave at once
                away = [_NOTHING if i == rail.idx else m for i, m in enumerate(messages)]
                exchange = self._start("combine/exchange", rail, [away])
        assert exchange is not None, "a dispatch has at least one part"
        return SumsInFlight(self, handle, exchange, messages[rail.idx])

    # -- dispatch: from the rail to the experts ------------------------------------------------

    def arrive(
        self, sources: Sequence[int], messages: Sequence[Tensor], wire: WireFormat
    ) -> tuple[Received, Part]:
        """Scatter what came over the rail from `sources`; collective over the node."""
        on_rail = joined_rows([wire.records(message) for message in messages])
        local_ranks_VK = self._local_ranks(on_rail["tail"]["slots"])
        forwarded = route_rows(local_ranks_VK, self.groups.node.size)
        arrived = [wire.records(message) for message in self._scatter(on_rail, forwarded)]
        tail_R = joined_rows([records["tail"] for records in arrived])
        order_R = tail_R["address"].argsort()
        in_order_R = tail_R[order_R]
        local_slots_RK = self._local_slots(in_order_R["slots"])
        part = Part(
            sources=tuple(sources),
            rail_counts=[message.shape[0] // wire.row_bytes for message in messages],
            local_ranks_VK=local_ranks_VK,
            forwarded=forwarded,
            recv_counts=[len(records) for records in arrived],
            order_R=order_R,
            address_R=in_order_R["address"],
            local_slots_RK=local_slots_RK,
            pairs=Pairs.of(local_slots_RK, in_order_R["weights"], order_R),
            range_R=torch.from_numpy(tail_R["range"]) if wire.with_range else None,
        )
        return self._hand_over([records["payload"] for records in arrived], part, wire), part

    def _local_ranks(self, slots_VK: NDArray[Any]) -> Indices:
        """The local rank of each entry that is on this node, -1 for the others."""
        node = self.groups.node
        first = self.groups.rail.idx * node.size * self.slots_per_rank
        ranks_VK = (slots_VK.astype(np.int64) - first) // self.slots_per_rank
        ranks_VK[(ranks_VK < 0) | (ranks_VK >= node.size)] = -1
        return ranks_VK

    def _scatter(self, on_rail: NDArray[Any], forwarded: RowRoute) -> list[Tensor]:
        """Flat rows that each local rank forwards to me."""
        messages = forwarded.messages(on_rail)
        return self._exchange("dispatch/scatter", self.groups.node, messages)

    def _hand_over(
        self, payloads: Sequence[NDArray[np.uint8]], part: Part, wire: WireFormat
    ) -> Received:
        """Rows in order of address, as the experts get them, from the payloads that each peer sent."""
        payload_RB = np.empty((len(part.order_R), payloads[0].shape[1]), np.uint8)
        places_R = inverse(part.order_R)
        start = 0
        for rows in payloads:
            payload_RB[places_R[start : start + len(rows)]] = rows
            start += len(rows)
        local_slots_RK = torch.from_numpy(part.local_slots_RK)
        return Received(x_RH=wire.decode(payload_RB), local_slots_RK=local_slots_RK)

    # -- combine: from the experts to the rail, and home -----------------------------------------

    def _sums_to_rail(self, part: Part, y_PH: Tensor, handle: HierarchicalHandle) -> list[Tensor]:
        """Encoded node sums for each source node of the part."""
        reduction = handle.reduction
        partial_RH = reduction.partial(y_PH, part.pairs, part.range_R)
        messages = [as_bytes(rows) for rows in torch.split(partial_RH, part.recv_counts)]
        arrived = self._exchange("combine/reduce", self.groups.node, messages)
        partials = self._partials(arrived, reduction)
        sum_VH = reduction.node_sum(partials, part.forwarded.parts, len(part.local_ranks_VK))
        return [reduction.encode(rows) for rows in torch.split(sum_VH, part.rail_counts)]

    def _pairs_to_rail(self, part: Part, y_PH: Tensor, handle: HierarchicalHandle) -> list[Tensor]:
        """Every pair's row for each source node of the part, by (token, k)."""
        rows_P = part.pairs.rows_P
        counts = sums_of_segments(
            np.bincount(rows_P, minlength=len(part.order_R)), part.recv_counts
        )
        arrival = torch.from_numpy(rows_P.argsort(kind="stable"))
        messages = [as_bytes(y_PH[of_rank]) for of_rank in torch.split(arrival, counts)]
        arrived = self._exchange("combine/reduce", self.groups.node, messages)
        pairs_PH = torch.cat(arrived).view(y_PH.dtype).view(-1, self.hidden)
        at_rail_PH = pairs_PH[torch.from_numpy(pairs_by_row(part.local_ranks_VK))]
        counts = sums_of_segments((part.local_ranks_VK >= 0).sum(axis=1), part.rail_counts)
        return [as_bytes(rows) for rows in torch.split(at_rail_PH, counts)]

    def finish(self, messages: list[Tensor], handle: HierarchicalHandle) -> Tensor:
        """out_TH from what the nodes sent home, in node order."""
        num_tokens = len(handle.weights_TK)
        if self.combine_mode == "exact":
            return self._sum_exact(messages, handle.nodes_TK, handle.weights_TK, handle.wire.dtype)
        reduction, sent = handle.reduction, handle.sent
        sums = [reduction.decode(m, n) for m, n in zip(messages, sent.counts, strict=True)]
        return reduction.total(sums, sent.parts, handle.range_T, num_tokens)

    def _own(self, handle: DispatchHandle) -> HierarchicalHandle:
        if not isinstance(handle, HierarchicalHandle):
            raise ValueError(f"not a handle of this dispatcher: {type(handle).__name__}")
        return handle


class TokensInFlight:
    """PendingDispatch: packed rows on the rail; those of my own node are at hand."""

    def __init__(
        self,
        dispatcher: HierarchicalDispatcher,
        handle: HierarchicalHandle,
        exchange: Booked,
        own: Tensor,
    ) -> None:
        self.handle = handle
        self._dispatcher, self._exchange, self._own = dispatcher, exchange, own
        self._split = dispatcher.overlap and dispatcher.topology.num_nodes > 1

    def __iter__(self) -> Iterator[Received]:
        rail = self._dispatcher.groups.rail
        if self._split:
            yield self._arrive([rail.idx], [self._own])
        messages = self._exchange.wait()
        messages[rail.idx] = self._own
        sources = [i for i in range(rail.size) if i != rail.idx or not self._split]
        yield self._arrive(sources, [messages[i] for i in sources])

    def _arrive(self, sources: list[int], messages: list[Tensor]) -> Received:
        received, part = self._dispatcher.arrive(sources, messages, self.handle.wire)
        self.handle = replace(
            self.handle,
            parts=(*self.handle.parts, part),
            num_pairs=(*self.handle.num_pairs, len(part.pairs)),
        )
        return received


class SumsInFlight:
    """PendingCombine: node sums on the rail; those of my own node are at hand."""

    def __init__(
        self,
        dispatcher: HierarchicalDispatcher,
        handle: HierarchicalHandle,
        exchange: Booked,
        own: Tensor,
    ) -> None:
        self._dispatcher, self._handle = dispatcher, handle
        self._exchange, self._own = exchange, own

    def wait(self) -> Tensor:
        messages = self._exchange.wait()
        messages[self._dispatcher.groups.rail.idx] = self._own
        return self._dispatcher.finish(messages, self._handle)


def _set_aside(
    chunks: Iterable[list[Tensor]], idx: int, own: list[Tensor]
) -> Iterator[list[Tensor]]:
    """The chunks without part `idx`, which goes to `own`."""
    for parts in chunks:
        own.append(parts[idx])
        parts[idx] = _NOTHING
        yield parts
