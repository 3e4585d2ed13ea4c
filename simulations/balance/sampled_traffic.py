"""Where sampled tokens go: rows and bytes between nodes and between the ranks of a node.

Which rows there are depends on the dispatcher. "hierarchical": one per (token, other node), which the
rank there with the token's local rank receives and hands to every other rank that the token needs.
"flat": one per (token, other rank). "low_latency": one per (token, expert) on another rank.

T tokens in the order of their ranks, L layers, K experts per token, N nodes, R ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from router.placement import IntArray
from simulations.balance.load_shares import FloatArray
from simulations.deployment import Deployment
from simulations.times.step_work import Sends
from simulations.traffic import wire_rows


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerTraffic:
    """Means over tokens, one layer. nodes, ranks: that a token needs, its own node not counted.
    node_rows: that cross nodes; rank_rows: that stay in one. bytes_NN: from node to node, dispatch and
    combine, what stays in a node on the diagonal."""

    nodes: float
    ranks: float
    node_rows: float
    rank_rows: float
    bytes_NN: FloatArray


class SampledTraffic:
    """Of one deployment."""

    def __init__(self, deployment: Deployment) -> None:
        self._topology, self._dispatcher = deployment.topology, deployment.dispatcher
        self._slots_per_rank, self._rows = deployment.slots_per_rank, wire_rows(deployment)

    def of_layer(self, slots_TK: IntArray, source_T: IntArray) -> LayerTraffic:
        """slots_TK: -1 = none; the tokens of one layer."""
        nodes, per_node = self._topology.num_nodes, self._topology.ranks_per_node
        rank_TK = np.sort(np.where(slots_TK >= 0, slots_TK // self._slots_per_rank, -1), axis=1)
        node_TK = np.where(rank_TK >= 0, rank_TK // per_node, -1)
        home_T = source_T // per_node
        new_rank_TK = (rank_TK >= 0) & (np.diff(rank_TK, axis=1, prepend=-1) != 0)
        visit_TK = (node_TK >= 0) & (np.diff(node_TK, axis=1, prepend=-1) != 0)
        away_TK = node_TK != home_T[:, None]
        if self._dispatcher == "hierarchical":
            cross_TK = visit_TK & away_TK
            inside_TK = new_rank_TK & ((rank_TK - source_T[:, None]) % per_node != 0)
        else:
            row_TK = rank_TK >= 0 if self._dispatcher == "low_latency" else new_rank_TK
            cross_TK = row_TK & away_TK
            inside_TK = row_TK & ~away_TK & (rank_TK != source_T[:, None])
        tokens = len(slots_TK)
        pair_TK = home_T[:, None] * nodes + node_TK
        crossing_NN = np.bincount(pair_TK[cross_TK], minlength=nodes * nodes).reshape(nodes, nodes)
        inside_N = np.bincount(node_TK[inside_TK], minlength=nodes)
        return LayerTraffic(
            nodes=float((visit_TK & away_TK).sum() / tokens),
            ranks=float(new_rank_TK.sum() / tokens),
            node_rows=float(crossing_NN.sum() / tokens),
            rank_rows=float(inside_N.sum() / tokens),
            bytes_NN=self._bytes(crossing_NN, inside_N) / tokens,
        )

    def _bytes(self, crossing_NN: IntArray, inside_N: IntArray) -> FloatArray:
        rows = self._rows
        total_NN = crossing_NN * rows.dispatch_exchange + crossing_NN.T * rows.combine_exchange
        if self._dispatcher == "hierarchical":
            inside = rows.dispatch_scatter + rows.combine_reduce
        else:
            inside = rows.dispatch_exchange + rows.combine_exchange
        return (total_NN + np.diag(inside_N * inside)).astype(np.float64)


def sends_of(layers: list[LayerTraffic]) -> Sends:
    """For the cost model."""
    return Sends(
        nodes_per_token_L=np.array([layer.nodes for layer in layers]),
        ranks_per_token_L=np.array([layer.ranks for layer in layers]),
    )
