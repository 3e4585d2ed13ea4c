"""Dispatch and combine in plain loops over the inputs of all ranks: the oracle of the dispatchers.

Legend: T tokens of one rank, H hidden, K top-k, R received rows, P pairs.

The reduction trees, which fix every bit of the result (sums start at fp32 zero):

    "node"    rank partial = sum over k in top-k order of weight * y      of the slots of one rank
              node partial = sum over ranks in rank order, rounded once by the codec that carries it
              result       = sum over nodes in node order, cast to the dtype of x
    "fixed"   result       = sum over all k of integers, see `fixed.py`, cast to the dtype of x
    "exact"   result       = sum over k in top-k order of weight * y, cast to the dtype of x

The origin's own node is rounded like the others, so "node" does not depend on which rank a token
lives on; "exact" does not depend on where the experts are either.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from comms.codecs import CODECS
from comms.dispatcher import CombineMode, Received, WireDtype
from comms.topology import Topology


@dataclass(frozen=True, kw_only=True)
class RankInput:
    """The arguments of one rank's dispatch."""

    x_TH: Tensor
    slots_TK: Tensor
    weights_TK: Tensor
    range_T: Tensor | None = None


def reference_dispatch(
    inputs: Sequence[RankInput],
    slots_per_rank: int,
    dispatch_dtype: WireDtype = "bfloat16",
) -> list[Received]:
    """What every rank receives, in rank order."""
    received = []
    for rank in range(len(inputs)):
        rows, slots = [], []
        for source in inputs:
            x_TH = _carried(source.x_TH, dispatch_dtype, source.x_TH.dtype)
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
    combine_dtype: WireDtype = "bfloat16",
) -> list[Tensor]:
    """out_TH of every rank from the y_PH of every rank, in rank order."""
    cursors = [0] * topology.world_size  # pairs of a rank are consumed in (source, token, k) order
    results = []
    for source in inputs:
        out_TH = torch.empty_like(source.x_TH)
        for t, slots_K in enumerate(source.slots_TK.tolist()):
            terms = []  # (rank, weight * y) in top-k order
            outputs_K = {}  # y by k
            for k, slot in enumerate(slots_K):
                if slot >= 0:
                    rank = slot // slots_per_rank
                    y_H = outputs[rank][cursors[rank]].float()
                    cursors[rank] += 1
                    terms.append((rank, y_H * source.weights_TK[t, k]))
                    outputs_K[k] = y_H
            if combine == "fixed":
                out_TH[t] = _fixed_sum(outputs_K, source, t)
            elif combine == "exact":
                out_TH[t] = _sum([term for _, term in terms], out_TH.shape[1])
            else:
                out_TH[t] = _sum_by_node(terms, topology, out_TH, combine_dtype)
        results.append(out_TH)
    return results


def _sum_by_node(
    terms: list[tuple[int, Tensor]], topology: Topology, like_TH: Tensor, codec: WireDtype
) -> Tensor:
    hidden = like_TH.shape[1]
    wire_dtype = like_TH.dtype if codec == "bfloat16" else torch.float32
    nodes = []
    for node in range(topology.num_nodes):
        ranks = [
            _sum([term for of, term in terms if of == rank], hidden)
            for rank in topology.node_ranks(node)
        ]
        nodes.append(_carried(_sum(ranks, hidden)[None], codec, wire_dtype)[0].float())
    return _sum(nodes, hidden)


def _fixed_sum(outputs_K: dict[int, Tensor], source: RankInput, t: int) -> Tensor:
    """The sum on the token's grid in Python's integers; fp32 where rounding is part of the deal."""
    assert source.range_T is not None, 'combine "fixed" needs ranges'
    num_topk, hidden = source.weights_TK.shape[1], source.x_TH.shape[1]
    steps = np.float32(2.0**22 if source.x_TH.dtype == torch.float32 else 2.0**15)
    token_range = np.float32(source.range_T[t])
    totals, refused = [0] * hidden, False
    for k, y_H in outputs_K.items():
        factor = np.float32(source.weights_TK[t, k]) * (steps / token_range)
        scaled_H = [np.float32(y) * factor for y in y_H.tolist()]
        if all(abs(float(q)) < 2**31 / num_topk for q in scaled_H) and 0 < token_range < np.inf:
            totals = [total + round(float(q)) for total, q in zip(totals, scaled_H, strict=True)]
        else:
            refused = True
    if refused:
        return torch.full((hidden,), float("nan"))
    return torch.tensor(totals).float() * (source.range_T[t] / float(steps))


def _sum(terms: Sequence[Tensor], hidden: int) -> Tensor:
    total_H = torch.zeros(hidden, dtype=torch.float32)
    for term_H in terms:
        total_H = total_H + term_H
    return total_H


def _carried(x_RH: Tensor, codec: WireDtype, dtype: torch.dtype) -> Tensor:
    """The rows after the codec has carried them as `dtype`."""
    rows = CODECS[codec].encode(x_RH.to(dtype))
    return CODECS[codec].decode(rows, x_RH.shape[1], dtype)
