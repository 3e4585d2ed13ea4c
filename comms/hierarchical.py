"""The hierarchical dispatcher: one copy of a token per node, one sum back per node.

Legend: T my tokens, H hidden, K top-k, R received rows, V rows on my rail, N nodes, L local ranks,
P pairs.

    dispatch   exchange  rail: my token, packed, once to every node it needs
               scatter   node: the same bytes on to every rank of this node that hosts a slot
    combine    reduce    node: each rank's weighted sum in fp32 goes to the rail rank, which adds
                         them in rank order and rounds once
               exchange  rail: one row per (token, node) goes home, and is added in node order

A token's *rail rank* at a node is the rank there with the local rank of its origin. The first
stage of other systems, gathering tokens to their rail, costs nothing here: after a reduce-scatter
every token already sits on one. With combine "exact" both ways back carry a row per (token, k).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from comms.base import BaseDispatcher
from comms.codec import WireFormat
from comms.dispatcher import DispatchHandle, Received
from comms.routes import (
    RowRoute,
    pairs_in_row_order,
    pairs_per_source,
    route_pairs,
    route_rows,
    sum_parts,
    weighted_sum,
)


@dataclass(frozen=True, kw_only=True)
class HierarchicalHandle(DispatchHandle):
    """At the origin: `sent` by node, nodes_TK. On the rail: `rail_counts` by source node, `forwarded`
    by local rank, local_ranks_VK. At the experts: rows by sending local rank, `order` that sorts
    them by source rank, local slots and weights (sorted)."""

    dtype: torch.dtype
    sent: RowRoute
    nodes_TK: Tensor
    rail_counts: list[int]
    forwarded: RowRoute
    local_ranks_VK: Tensor
    recv_counts: list[int]
    order: Tensor
    local_slots_RK: Tensor
    weights_RK: Tensor


class HierarchicalDispatcher(BaseDispatcher):
    """TokenDispatcher in two tiers: rails between nodes, shared memory within."""

    def dispatch(
        self, x_TH: Tensor, slots_TK: Tensor, weights_TK: Tensor
    ) -> tuple[Received, HierarchicalHandle]:
        wire = self._check(x_TH, slots_TK, weights_TK)
        rail, topology = self.groups.rail, self.topology
        slots_per_node = topology.ranks_per_node * self.slots_per_rank
        nodes_TK = slots_TK.div(slots_per_node, rounding_mode="floor")
        sent = route_rows(nodes_TK, topology.num_nodes)
        rail_counts = self._exchange_counts(rail, torch.tensor(sent.counts)).tolist()
        packed = wire.pack(x_TH, slots_TK, weights_TK)[sent.rows]
        rail_rows = self._send("dispatch/exchange", rail, packed, sent.counts, rail_counts)

        slots_VK = wire.unpack_slots(rail_rows) - rail.idx * slots_per_node
        here_VK = (slots_VK >= 0) & (slots_VK < slots_per_node)
        local_ranks_VK = torch.where(here_VK, slots_VK // self.slots_per_rank, -1)
        forwarded = route_rows(local_ranks_VK, topology.ranks_per_node)
        rows, recv_counts, order = self._scatter(rail_rows, rail_counts, forwarded)

        received, weights_RK = self._unpack(wire, rows[order])
        handle = HierarchicalHandle(
            num_pairs=int((received.local_slots_RK >= 0).sum()),
            weights_TK=weights_TK,
            dtype=x_TH.dtype,
            sent=sent,
            nodes_TK=nodes_TK,
            rail_counts=rail_counts,
            forwarded=forwarded,
            local_ranks_VK=local_ranks_VK,
            recv_counts=recv_counts,
            order=order,
            local_slots_RK=received.local_slots_RK,
            weights_RK=weights_RK,
        )
        return received, handle

    def combine(self, y_PH: Tensor, handle: DispatchHandle) -> Tensor:
        if not isinstance(handle, HierarchicalHandle):
            raise ValueError(f"not a handle of this dispatcher: {type(handle).__name__}")
        self._check_outputs(y_PH, handle.num_pairs, handle.dtype)
        total_TH = (
            self._combine_exact(y_PH, handle)
            if self.combine_mode == "exact"
            else self._combine_by_node(y_PH, handle)
        )
        return total_TH.to(handle.dtype)

    def _scatter(
        self, rail_rows: Tensor, rail_counts: list[int], forwarded: RowRoute
    ) -> tuple[Tensor, list[int], Tensor]:
        """Rows by (local rank that forwards, source node, token), their counts by local rank, and
        the order that sorts them by (source rank, token)."""
        node, num_nodes = self.groups.node, self.topology.num_nodes
        source_V = torch.repeat_interleave(torch.arange(num_nodes), torch.tensor(rail_counts))
        targets = torch.repeat_interleave(torch.arange(node.size), torch.tensor(forwarded.counts))
        counts_LN = torch.bincount(
            targets * num_nodes + source_V[forwarded.rows], minlength=node.size * num_nodes
        ).view(node.size, num_nodes)
        counts_LN = self._exchange_counts(node, counts_LN)
        recv_counts = counts_LN.sum(dim=1).tolist()
        rows = self._send(
            "dispatch/scatter", node, rail_rows[forwarded.rows], forwarded.counts, recv_counts
        )
        source_rank_LN = torch.arange(num_nodes) * node.size + torch.arange(node.size)[:, None]
        source_rank_R = torch.repeat_interleave(source_rank_LN.reshape(-1), counts_LN.reshape(-1))
        return rows, recv_counts, torch.sort(source_rank_R, stable=True).indices

    def _unpack(self, wire: WireFormat, rows: Tensor) -> tuple[Received, Tensor]:
        slots_RK = wire.unpack_slots(rows) - self.rank * self.slots_per_rank
        mine_RK = (slots_RK >= 0) & (slots_RK < self.slots_per_rank)
        local_slots_RK = torch.where(mine_RK, slots_RK, -1)
        received = Received(x_RH=wire.unpack_x(rows), local_slots_RK=local_slots_RK)
        return received, wire.unpack_weights(rows)

    def _combine_by_node(self, y_PH: Tensor, handle: HierarchicalHandle) -> Tensor:
        node, rail = self.groups.node, self.groups.rail
        sent, forwarded = handle.sent, handle.forwarded
        positions_RK = route_pairs(handle.local_slots_RK.clamp(max=0), 1).positions_RK
        partial_RH = torch.empty((len(positions_RK), self.hidden), dtype=torch.float32)
        partial_RH[handle.order] = weighted_sum(y_PH, positions_RK, handle.weights_RK)
        partials = self._send(
            "combine/reduce", node, partial_RH, handle.recv_counts, forwarded.counts
        )
        parts = list(torch.split(partials, forwarded.counts))
        num_rail_rows = len(handle.local_ranks_VK)
        sum_VH = sum_parts(parts, forwarded.parts, num_rail_rows, self.hidden)
        home = self._send(
            "combine/exchange", rail, sum_VH.to(handle.dtype), handle.rail_counts, sent.counts
        )
        of_node = list(torch.split(home, sent.counts))
        return sum_parts(of_node, sent.parts, len(handle.weights_TK), self.hidden)

    def _combine_exact(self, y_PH: Tensor, handle: HierarchicalHandle) -> Tensor:
        node, rail = self.groups.node, self.groups.rail
        positions_RK = route_pairs(handle.local_slots_RK.clamp(max=0), 1).positions_RK
        as_received_RK = torch.empty_like(positions_RK)
        as_received_RK[handle.order] = positions_RK
        forward = route_pairs(handle.local_ranks_VK, node.size)
        at_rail = self._send(
            "combine/reduce",
            node,
            y_PH[pairs_in_row_order(as_received_RK)],
            pairs_per_source(as_received_RK, handle.recv_counts),
            forward.counts,
        )
        route = route_pairs(handle.nodes_TK, rail.size)
        home = self._send(
            "combine/exchange",
            rail,
            at_rail[pairs_in_row_order(forward.positions_RK)],
            pairs_per_source(handle.local_ranks_VK, handle.rail_counts),
            route.counts,
        )
        return weighted_sum(home, route.positions_RK, handle.weights_TK)
