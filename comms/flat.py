"""The flat dispatcher: every rank talks to every rank directly, nodes or not.

Legend: T my tokens, H hidden, K top-k, R received rows, P pairs.

    dispatch   counts, then one packed row per (token, rank)           world all-to-all, twice
    combine    "node": one fp32 partial sum per (token, rank)          world all-to-all, once
               "exact": one row per (token, k) in the model's dtype
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from comms.base import BaseDispatcher
from comms.dispatcher import DispatchHandle, Received
from comms.routes import (
    RowRoute,
    pairs_per_source,
    route_pairs,
    route_rows,
    sum_parts,
    weighted_sum,
)


@dataclass(frozen=True, kw_only=True)
class FlatHandle(DispatchHandle):
    """sent: my rows by destination rank. destinations_TK: the rank of each entry. The rest is
    about what I received: rows per source rank, local slots and weights."""

    dtype: torch.dtype
    sent: RowRoute
    destinations_TK: Tensor
    recv_counts: list[int]
    local_slots_RK: Tensor
    weights_RK: Tensor


class FlatDispatcher(BaseDispatcher):
    """TokenDispatcher over one world all-to-all. Bit-equal to the hierarchical one."""

    def dispatch(
        self, x_TH: Tensor, slots_TK: Tensor, weights_TK: Tensor
    ) -> tuple[Received, FlatHandle]:
        wire = self._check(x_TH, slots_TK, weights_TK)
        world = self.groups.world
        destinations_TK = slots_TK.div(self.slots_per_rank, rounding_mode="floor")
        sent = route_rows(destinations_TK, world.size)
        recv_counts = self._exchange_counts(world, torch.tensor(sent.counts)).tolist()
        packed = wire.pack(x_TH, slots_TK, weights_TK)[sent.rows]
        rows = self._send("dispatch", world, packed, sent.counts, recv_counts)
        slots_RK = wire.unpack_slots(rows) - self.rank * self.slots_per_rank
        mine_RK = (slots_RK >= 0) & (slots_RK < self.slots_per_rank)
        local_slots_RK = torch.where(mine_RK, slots_RK, -1)
        handle = FlatHandle(
            num_pairs=int(mine_RK.sum()),
            weights_TK=weights_TK,
            dtype=x_TH.dtype,
            sent=sent,
            destinations_TK=destinations_TK,
            recv_counts=recv_counts,
            local_slots_RK=local_slots_RK,
            weights_RK=wire.unpack_weights(rows),
        )
        return Received(x_RH=wire.unpack_x(rows), local_slots_RK=local_slots_RK), handle

    def combine(self, y_PH: Tensor, handle: DispatchHandle) -> Tensor:
        if not isinstance(handle, FlatHandle):
            raise ValueError(f"not a handle of this dispatcher: {type(handle).__name__}")
        self._check_outputs(y_PH, handle.num_pairs, handle.dtype)
        total_TH = (
            self._combine_exact(y_PH, handle)
            if self.combine_mode == "exact"
            else self._combine_by_node(y_PH, handle)
        )
        return total_TH.to(handle.dtype)

    def _combine_exact(self, y_PH: Tensor, handle: FlatHandle) -> Tensor:
        world = self.groups.world
        returns = pairs_per_source(handle.local_slots_RK, handle.recv_counts)
        route = route_pairs(handle.destinations_TK, world.size)
        pairs_PH = self._send("combine", world, y_PH, returns, route.counts)
        return weighted_sum(pairs_PH, route.positions_RK, handle.weights_TK)

    def _combine_by_node(self, y_PH: Tensor, handle: FlatHandle) -> Tensor:
        world, sent = self.groups.world, handle.sent
        positions_RK = route_pairs(handle.local_slots_RK.clamp(max=0), 1).positions_RK
        partial_RH = weighted_sum(y_PH, positions_RK, handle.weights_RK)
        back = self._send("combine", world, partial_RH, handle.recv_counts, sent.counts)
        parts = list(torch.split(back, sent.counts))
        num_tokens = handle.weights_TK.shape[0]
        total_TH = torch.zeros((num_tokens, self.hidden), dtype=torch.float32)
        for node in range(self.topology.num_nodes):
            ranks = slice(self.topology.node_ranks(node)[0], self.topology.node_ranks(node)[-1] + 1)
            of_node = sum_parts(parts[ranks], sent.parts[ranks], num_tokens, self.hidden)
            total_TH += of_node.to(handle.dtype)
        return total_TH
