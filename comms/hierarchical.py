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

import torch
from torch import Tensor

from comms.base import BaseDispatcher, Booked
from comms.codec import WireFormat
from comms.codecs import CODECS
from comms.dispatcher import DispatchHandle, Received
from comms.overlap import OverlapRule
from comms.reduction import Reduction
from comms.routes import (
    RowRoute,
    pair_positions,
    pairs_in_row_order,
    pairs_per_segment,
    route_pairs,
    route_rows,
    weighted_sum,
)
from comms.sizes import as_bytes

_NOTHING = torch.empty(0, dtype=torch.uint8)
_ADDRESS_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class Part:
    """Rows of some source nodes, on the rail and at the experts of this rank.

    On the rail: rail_counts by source, the local ranks of each entry, `forwarded` by local rank.
    At the experts, rows in order of address: `received` are those that each local rank forwarded, in
    its order; addresses, local slots, weights and ranges.
    """

    sources: tuple[int, ...]
    rail_counts: list[int]
    local_ranks_VK: Tensor
    forwarded: RowRoute
    received: list[Tensor]
    address_R: Tensor
    local_slots_RK: Tensor
    weights_RK: Tensor
    range_R: Tensor | None


@dataclass(frozen=True, kw_only=True)
class HierarchicalHandle(DispatchHandle):
    """At the origin: `sent` by node, nodes_TK. Elsewhere: `parts`."""

    wire: WireFormat
    reduction: Reduction
    sent: RowRoute
    nodes_TK: Tensor
    parts: tuple[Part, ...]


class HierarchicalDispatcher(BaseDispatcher):
    """TokenDispatcher in two tiers: rails between nodes, shared memory within."""

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
        nodes_TK = slots_TK.div(slots_per_node, rounding_mode="floor")
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
        rows = self._packed(wire, x_TH, slots_TK, weights_TK, range_T)
        chunks = _set_aside(sent.of_chunks(self._addressed(rows)), self.groups.rail.idx, own)
        exchange = self._start("dispatch/exchange", self.groups.rail, chunks)
        return TokensInFlight(self, handle, exchange, torch.cat(own))

    def dispatch_again(self, x_TH: Tensor, handle: DispatchHandle) -> Tensor:
        handle = self._own(handle)
        codec = CODECS[handle.wire.codec]
        sent = codec.encode(x_TH)
        messages = [sent[rows].reshape(-1) for rows in handle.sent.parts]
        arrived = self._exchange("dispatch/exchange", self.groups.rail, messages)
        again = []
        for part in handle.parts:
            on_rail = _rows([arrived[source] for source in part.sources], sent.shape[1])
            rows = _rows(self._scatter(on_rail, part.forwarded), sent.shape[1])
            in_order = torch.empty_like(rows).index_copy_(0, torch.cat(part.received), rows)
            x_RH = codec.decode(in_order, self.hidden, x_TH.dtype)
            again.append(self._hand_over(x_RH, part).x_RH)
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
        row_bytes = wire.row_bytes + _ADDRESS_BYTES
        on_rail = _rows(messages, row_bytes)
        local_ranks_VK = self._local_ranks(wire.unpack_slots(on_rail))
        forwarded = route_rows(local_ranks_VK, self.groups.node.size)
        arrived = self._scatter(on_rail, forwarded)
        rows_RB = _rows(arrived, row_bytes)
        order = torch.argsort(_address(rows_RB))
        places = torch.empty_like(order).index_copy_(0, order, torch.arange(len(order)))
        rows_RB = rows_RB[order]

        slots_RK = wire.unpack_slots(rows_RB) - self.rank * self.slots_per_rank
        mine_RK = (slots_RK >= 0) & (slots_RK < self.slots_per_rank)
        part = Part(
            sources=tuple(sources),
            rail_counts=[message.numel() // row_bytes for message in messages],
            local_ranks_VK=local_ranks_VK,
            forwarded=forwarded,
            received=list(torch.split(places, [m.numel() // row_bytes for m in arrived])),
            address_R=_address(rows_RB),
            local_slots_RK=torch.where(mine_RK, slots_RK, -1),
            weights_RK=wire.unpack_weights(rows_RB),
            range_R=wire.unpack_range(rows_RB) if wire.with_range else None,
        )
        return self._hand_over(wire.unpack_x(rows_RB), part), part

    def _local_ranks(self, slots_VK: Tensor) -> Tensor:
        """The local rank of each entry that is on this node, -1 for the others."""
        node = self.groups.node
        first = self.groups.rail.idx * node.size * self.slots_per_rank
        ranks_VK = (slots_VK - first).div(self.slots_per_rank, rounding_mode="floor")
        return torch.where((ranks_VK >= 0) & (ranks_VK < node.size) & (slots_VK >= 0), ranks_VK, -1)

    def _scatter(self, on_rail: Tensor, forwarded: RowRoute) -> list[Tensor]:
        """Flat rows that each local rank forwards to me."""
        messages = [on_rail[rows].reshape(-1) for rows in forwarded.parts]
        return self._exchange("dispatch/scatter", self.groups.node, messages)

    def _hand_over(self, x_RH: Tensor, part: Part) -> Received:
        """Rows in order of address, as the experts get them."""
        return Received(x_RH=x_RH, local_slots_RK=part.local_slots_RK)

    # -- combine: from the experts to the rail, and home -----------------------------------------

    def _sums_to_rail(self, part: Part, y_PH: Tensor, handle: HierarchicalHandle) -> list[Tensor]:
        """Encoded node sums for each source node of the part."""
        reduction = handle.reduction
        positions_RK = pair_positions(part.local_slots_RK)
        partial_RH = reduction.partial(y_PH, positions_RK, part.weights_RK, part.range_R)
        messages = [as_bytes(partial_RH[rows]) for rows in part.received]
        arrived = self._exchange("combine/reduce", self.groups.node, messages)
        partials = [
            m.view(reduction.partial_dtype).view(-1, reduction.partial_columns) for m in arrived
        ]
        sum_VH = reduction.node_sum(partials, part.forwarded.parts, len(part.local_ranks_VK))
        return [reduction.encode(rows) for rows in torch.split(sum_VH, part.rail_counts)]

    def _pairs_to_rail(self, part: Part, y_PH: Tensor, handle: HierarchicalHandle) -> list[Tensor]:
        """Every pair's row for each source node of the part, by (token, k)."""
        positions_RK = pair_positions(part.local_slots_RK)
        pairs = [pairs_in_row_order(positions_RK[rows]) for rows in part.received]
        messages = [as_bytes(y_PH[of_rank]) for of_rank in pairs]
        arrived = self._exchange("combine/reduce", self.groups.node, messages)
        pairs_PH = torch.cat(arrived).view(y_PH.dtype).view(-1, self.hidden)
        forward = route_pairs(part.local_ranks_VK, self.groups.node.size)
        at_rail_PH = pairs_PH[pairs_in_row_order(forward.positions_RK)]
        counts = pairs_per_segment(part.local_ranks_VK, part.rail_counts)
        return [as_bytes(rows) for rows in torch.split(at_rail_PH, counts)]

    def finish(self, messages: list[Tensor], handle: HierarchicalHandle) -> Tensor:
        """out_TH from what the nodes sent home, in node order."""
        dtype, num_tokens = handle.wire.dtype, len(handle.weights_TK)
        if self.combine_mode == "exact":
            pairs_PH = torch.cat(messages).view(dtype).view(-1, self.hidden)
            route = route_pairs(handle.nodes_TK, self.topology.num_nodes)
            return weighted_sum(pairs_PH, route.positions_RK, handle.weights_TK).to(dtype)
        reduction, sent = handle.reduction, handle.sent
        sums = [reduction.decode(m, n) for m, n in zip(messages, sent.counts, strict=True)]
        return reduction.total(sums, sent.parts, handle.range_T, num_tokens)

    def _addressed(self, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        """Packed rows of my tokens with their addresses, as the last four bytes."""
        address = self.rank * self.stride
        for rows in chunks:
            address_T = torch.arange(address, address + len(rows), dtype=torch.int32)
            yield torch.cat([rows, address_T[:, None].view(torch.uint8)], dim=1)
            address += len(rows)

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
        num_pairs = int((part.local_slots_RK >= 0).sum())
        self.handle = replace(
            self.handle,
            parts=(*self.handle.parts, part),
            num_pairs=(*self.handle.num_pairs, num_pairs),
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


def _rows(messages: Sequence[Tensor], row_bytes: int) -> Tensor:
    flat = messages[0] if len(messages) == 1 else torch.cat(list(messages))
    return flat.view(-1, row_bytes)


def _address(rows_RB: Tensor) -> Tensor:
    return rows_RB[:, -_ADDRESS_BYTES:].contiguous().view(torch.int32)[:, 0].long()
