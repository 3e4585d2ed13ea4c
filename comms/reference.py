"""Dispatch and combine in plain loops over the inputs of all ranks: the oracle of the dispatchers.

Legend: T tokens of one rank, H hidden, K top-k, R received rows, P pairs.

The reduction trees, which fix every bit of the result (sums start at fp32 zero):

    "node"    rank partial = sum over k in top-k order of weight * y      of the slots of one rank
              node partial = sum over ranks in rank order, rounded once to the dtype of x
              result       = sum over nodes in node order, cast to the dtype of x
    "exact"   result       = sum over k in top-k order of weight * y, cast to the dtype of x

The origin's own node is rounded like the others, so "node" does not depend on which rank a token
lives on; "exact" does not depend on where the experts are either.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from comms.codec import dequantize, quantize
from comms.dispatcher import CombineMode, DispatchDtype, Received
from comms.topology import Topology


@dataclass(frozen=True, kw_only=True)
class RankInput:
    """The arguments of one rank's dispatch."""

    x_TH: Tensor
    slots_TK: Tensor
    weights_TK: Tensor


def reference_dispatch(
    inputs: Sequence[RankInput],
    slots_per_rank: int,
    dispatch_dtype: DispatchDtype = "bfloat16",
) -> list[Received]:
    """What every rank receives, in rank order."""
    received = []
    for rank in range(len(inputs)):
        rows, slots = [], []
        for source in inputs:
            x_TH = source.x_TH
            if dispatch_dtype == "float8":
                x_TH = dequantize(*quantize(x_TH), x_TH.dtype)
            for x_H, slots_K in zip(x_TH, source.slots_TK.tolist(), strict=True):
                local_K = [
                    slot % slots_per_rank if slot >= 0 and slot // slots_per_rank == rank else -1
                    for slot in slots_K
                ]
                if max(local_K) >= 0:
                    rows.append(x_H)
                    slots.append(local_K)
        first = inputs[0]
        received.append(
            Received(
                x_RH=torch.stack(rows) if rows else first.x_TH[:0],
                local_slots_RK=torch.tensor(slots, dtype=torch.int64)
                if slots
                else first.slots_TK[:0],
            )
        )
    return received


def reference_combine(
    outputs: Sequence[Tensor],
    inputs: Sequence[RankInput],
    topology: Topology,
    slots_per_rank: int,
    combine: CombineMode = "node",
) -> list[Tensor]:
    """out_TH of every rank from the y_PH of every rank, in rank order."""
    cursors = [0] * topology.world_size  # pairs of a rank are consumed in (source, token, k) order
    results = []
    for source in inputs:
        out_TH = torch.empty_like(source.x_TH)
        for t, slots_K in enumerate(source.slots_TK.tolist()):
            terms = []  # (rank, weight * y) in top-k order
            for k, slot in enumerate(slots_K):
                if slot >= 0:
                    rank = slot // slots_per_rank
                    y_H = outputs[rank][cursors[rank]].float()
                    cursors[rank] += 1
                    terms.append((rank, y_H * source.weights_TK[t, k]))
            total_H = (
                _sum([term for _, term in terms], out_TH.shape[1])
                if combine == "exact"
                else _sum_by_node(terms, topology, out_TH)
            )
            out_TH[t] = total_H.to(out_TH.dtype)
        results.append(out_TH)
    return results


def _sum_by_node(terms: list[tuple[int, Tensor]], topology: Topology, like_TH: Tensor) -> Tensor:
    hidden = like_TH.shape[1]
    nodes = []
    for node in range(topology.num_nodes):
        ranks = [
            _sum([term for of, term in terms if of == rank], hidden)
            for rank in topology.node_ranks(node)
        ]
        nodes.append(_sum(ranks, hidden).to(like_TH.dtype).float())
    return _sum(nodes, hidden)


def _sum(terms: Sequence[Tensor], hidden: int) -> Tensor:
    total_H = torch.zeros(hidden, dtype=torch.float32)
    for term_H in terms:
        total_H = total_H + term_H
    return total_H
