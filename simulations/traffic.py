"""What a dispatch and its combine send over every link: closed forms of what the ledger books.

Rows per link follow from the slots that tokens were sent to, bytes per row from `wire.py`. The stages
are those of `comms/hierarchical.py` and `comms/flat.py`; a stage's bytes are a matrix over ranks,
[source, destination], zero where rows stay on their rank.

T tokens of a rank, K experts per token, R ranks, N nodes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from comms.topology import Topology
from simulations.deployment import Deployment
from simulations.wire import ESCAPE_BYTES, IntArray, Wire, WireRows

LinkBytes = dict[str, IntArray]
"""By stage, [R, R]: bytes from each rank to each other one."""


def wire_rows(deployment: Deployment) -> WireRows:
    """Bytes of a row in each stage, with sums in floating point (combine "node").

    "low_latency" in a deployment is a row per (token, expert), both ways in one exchange.
    """
    per_expert = deployment.dispatcher == "low_latency"
    wire = Wire(
        hidden=deployment.model.hidden_size,
        num_topk=deployment.model.gate.num_experts_per_token,
        num_slots=deployment.num_slots,
        dispatcher="flat" if per_expert else deployment.dispatcher,
        dispatch_dtype=deployment.dispatch_dtype,
        combine_dtype=deployment.combine_dtype,
    )
    if per_expert:
        return replace(wire.rows, combine_exchange=deployment.combine_row_bytes)
    return wire.rows


@dataclass(frozen=True, kw_only=True, eq=False)
class Visits:
    """Of one batch: tokens_RR[r, q] tokens of rank r that need rank q, pairs_RR[r, q] their (token,
    k) entries there, nodes_RN[r, n] tokens of r that need node n."""

    topology: Topology
    tokens_RR: IntArray
    pairs_RR: IntArray
    nodes_RN: IntArray

    def __add__(self, other: Visits) -> Visits:
        return Visits(
            topology=self.topology,
            tokens_RR=self.tokens_RR + other.tokens_RR,
            pairs_RR=self.pairs_RR + other.pairs_RR,
            nodes_RN=self.nodes_RN + other.nodes_RN,
        )


def node_visits(
    slots: Sequence[NDArray[np.integer]], topology: Topology, slots_per_rank: int
) -> Visits:
    """From the global slots [T, K] of each source rank's tokens, -1 = none; T may differ."""
    size, shape = topology.world_size, (topology.num_nodes, topology.ranks_per_node)
    if len(slots) != size:
        raise ValueError(f"expected the slots of {size} ranks, got {len(slots)}")
    tokens_RR = np.zeros((size, size), dtype=np.int64)
    pairs_RR = np.zeros((size, size), dtype=np.int64)
    nodes_RN = np.zeros((size, topology.num_nodes), dtype=np.int64)
    for rank, slots_TK in enumerate(slots):
        counts_TR = _counts(slots_TK, slots_per_rank, size)
        pairs_RR[rank] = counts_TR.sum(axis=0)
        tokens_RR[rank] = (counts_TR > 0).sum(axis=0)
        of_node_TN = counts_TR.reshape(len(slots_TK), *shape).any(axis=2)
        nodes_RN[rank] = of_node_TN.sum(axis=0)
    return Visits(topology=topology, tokens_RR=tokens_RR, pairs_RR=pairs_RR, nodes_RN=nodes_RN)


def link_bytes(visits: Visits, wire: Wire, escapes_RR: IntArray | None = None) -> LinkBytes:
    """What one dispatch and its combine send, stage by stage.

    escapes_RR: of the messages of "combine/exchange" with combine "fixed", see `ESCAPE_BYTES`.
    """
    if wire.is_flat:
        back_RR = visits.pairs_RR if wire.combine == "exact" else visits.tokens_RR
        return {
            "dispatch": _between(visits.tokens_RR) * wire.row_bytes,
            "combine": _between(back_RR).T * wire.partial_bytes,
        }
    topology = visits.topology
    tokens_RR = _at_rail(visits.tokens_RR, topology)
    nodes_RR = _to_rail(visits.nodes_RN, topology)
    if wire.combine == "exact":
        reduce_RR = _at_rail(visits.pairs_RR, topology).T * wire.partial_bytes
        of_node_RN = visits.pairs_RR.reshape(len(visits.pairs_RR), topology.num_nodes, -1)
        home_RR = _to_rail(of_node_RN.sum(axis=2), topology).T * wire.sum_bytes
    else:
        reduce_RR = tokens_RR.T * wire.partial_bytes
        home_RR = wire.sums_message_bytes(nodes_RR.T)
    if escapes_RR is not None:
        home_RR = home_RR + escapes_RR * ESCAPE_BYTES
    return {
        "dispatch/exchange": nodes_RR * wire.row_bytes,
        "dispatch/scatter": tokens_RR * wire.row_bytes,
        "combine/reduce": reduce_RR,
        "combine/exchange": home_RR,
    }


def added(parts: Iterable[LinkBytes]) -> LinkBytes:
    """Stage by stage: of several batches or layers."""
    total: LinkBytes = {}
    for part in parts:
        for stage, bytes_RR in part.items():
            total[stage] = total[stage] + bytes_RR if stage in total else bytes_RR
    return total


def node_traffic(links: LinkBytes, topology: Topology) -> IntArray:
    """[N, N]: bytes of all stages from node to node; what stays in a node is on the diagonal."""
    nodes, per_node = topology.num_nodes, topology.ranks_per_node
    total_RR = sum(links.values(), np.zeros((topology.world_size,) * 2, dtype=np.int64))
    return np.asarray(total_RR.reshape(nodes, per_node, nodes, per_node).sum(axis=(1, 3)))


def _counts(slots_TK: NDArray[np.integer], slots_per_rank: int, num_ranks: int) -> IntArray:
    """[T, R]: how many of a token's slots are on each rank."""
    rows, places = np.nonzero(slots_TK >= 0)
    ranks_P = slots_TK[rows, places].astype(np.int64) // slots_per_rank
    if len(ranks_P) and ranks_P.max() >= num_ranks:
        raise ValueError(
            f"slot {slots_TK.max()} is beyond num_ranks({num_ranks}) * slots_per_rank("
            f"{slots_per_rank})"
        )
    flat = np.bincount(rows * num_ranks + ranks_P, minlength=len(slots_TK) * num_ranks)
    return flat.reshape(len(slots_TK), num_ranks)


def _between(rows_RR: IntArray) -> IntArray:
    """Without what stays on its rank."""
    return np.where(np.eye(len(rows_RR), dtype=bool), 0, rows_RR)


def _at_rail(rows_RR: IntArray, topology: Topology) -> IntArray:
    """[rail rank, rank of its node]: rows of all sources of the rail that are for the rank."""
    nodes, per_node = topology.num_nodes, topology.ranks_per_node
    # source node, local rank of source = of the rail, destination node, destination's local rank
    of_rail = rows_RR.reshape(nodes, per_node, nodes, per_node).sum(axis=0)
    at_RR = np.zeros_like(rows_RR)
    for node in range(nodes):
        ranks = slice(node * per_node, (node + 1) * per_node)
        at_RR[ranks, ranks] = of_rail[:, node]
    return _between(at_RR)


def _to_rail(rows_RN: IntArray, topology: Topology) -> IntArray:
    """[source, its rail rank on another node]: rows for that node."""
    size = topology.world_size
    to_RR = np.zeros((size, size), dtype=np.int64)
    for rank in range(size):
        to_RR[rank, list(topology.rail_ranks(topology.local_rank_of(rank)))] = rows_RN[rank]
    return _between(to_RR)
