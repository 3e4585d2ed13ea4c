"""Seconds of dispatch and combine: the bytes of the busiest rank on each class of link.

Dispatch, hierarchical: a rank sends one row per (token, other node) over its rail, and receives what
its node's experts draw from the other nodes on the same rail; then each rank receives one row per
token of its experts from its node's ranks. Flat and low-latency: rows go straight to their ranks, by
both classes of links at once. Combine is the same backwards, with its own size of rows: what was
sent is received.

    rows that a rank's experts need   = its (token, expert) pairs x ranks per token / top-k
    chance that a token visits a node = 1 - (1 - mean chance) ^ (node's pairs / mean of the nodes)

The latter is what independent choices would give: a node with twice the load is not visited twice as
often if most tokens visit it anyway. On random routing with lognormal loads (sigma 0.5 to 1) it is 1
to 3 % low, where proportion is 4 to 16 % high.

B steps, L expert layers, R ranks, N nodes, G ranks of a node.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simulations.deployment import Deployment
from simulations.hardware.calibration import Calibration
from simulations.times.group_sums import group_sums
from simulations.times.network import Link
from simulations.times.step_work import Sends

Array = NDArray[Any]


class ExchangeTimes:
    def __init__(self, deployment: Deployment, calibration: Calibration) -> None:
        self._deployment, self._calibration = deployment, calibration
        self._top_k = deployment.model.gate.num_experts_per_token

    def both(
        self, rank_tokens_BLR: Array, sends: Sends, source_tokens_BR: Array
    ) -> tuple[Array, Array]:
        """Seconds of dispatch and of combine, float [B, L] each.

        rank_tokens: (token, expert) pairs that each rank computes. source_tokens: tokens that each
        rank brings, [B, R] or broadcastable.
        """
        if self._deployment.dispatcher == "hierarchical":
            rows = self._hierarchical(rank_tokens_BLR, sends, source_tokens_BR)
        else:
            rows = self._straight(rank_tokens_BLR, sends, source_tokens_BR)
        deployment, calibration = self._deployment, self._calibration
        dispatch, combine = calibration.dispatch, calibration.combine
        if deployment.dispatcher == "low_latency":
            dispatch, combine = calibration.low_latency_dispatch, calibration.low_latency_combine
        return (
            self._seconds(rows, deployment.dispatch_row_bytes, dispatch),
            self._seconds(rows, deployment.combine_row_bytes, combine),
        )

    def _seconds(
        self, rows: Mapping[str, Array], row_bytes: int, links: Mapping[str, Link]
    ) -> Array:
        stages = [links[where].seconds(rows_BL * row_bytes) for where, rows_BL in rows.items()]
        at_once = (
            self._calibration.pipelined_stages or self._deployment.dispatcher != "hierarchical"
        )
        return np.maximum(*stages) if at_once else np.add(*stages)

    def _hierarchical(
        self, rank_tokens_BLR: Array, sends: Sends, source_tokens_BR: Array
    ) -> dict[str, Array]:
        topology = self._deployment.topology
        nodes, in_node = topology.num_nodes, topology.ranks_per_node
        drawn = rank_tokens_BLR.max(axis=-1) * (sends.ranks_per_token_L / self._top_k)
        node_rows = drawn * ((in_node - 1) / in_node)
        if nodes == 1:
            return {"network": np.zeros_like(drawn), "node": node_rows}
        sent_BL = source_tokens_BR.max(axis=-1)[:, None] * sends.nodes_per_token_L
        rail_BNG = source_tokens_BR.reshape(-1, nodes, in_node)
        # The busiest rail of what the other nodes bring to each node.
        others_BN = (rail_BNG.sum(axis=1, keepdims=True) - rail_BNG).max(axis=-1)
        pairs_BLN = group_sums(rank_tokens_BLR, in_node)
        share_BLN = pairs_BLN * (nodes / np.maximum(pairs_BLN.sum(axis=-1, keepdims=True), 1e-30))
        missed_L1 = np.clip(1 - sends.nodes_per_token_L / (nodes - 1), 0, 1)[:, None]
        visit_BLN = 1 - missed_L1**share_BLN
        received_BL = (visit_BLN * others_BN[:, None, :]).max(axis=-1)
        return {"network": np.maximum(sent_BL, received_BL), "node": node_rows}

    def _straight(
        self, rank_tokens_BLR: Array, sends: Sends, source_tokens_BR: Array
    ) -> dict[str, Array]:
        topology = self._deployment.topology
        ranks, in_node = topology.world_size, topology.ranks_per_node
        per_token = sends.ranks_per_token_L
        if self._deployment.dispatcher == "low_latency":
            per_token = np.full_like(per_token, self._top_k)
        received_BL = rank_tokens_BLR.max(axis=-1) * (per_token / self._top_k)
        sent_BL = source_tokens_BR.max(axis=-1)[:, None] * per_token
        busiest_BL = np.maximum(sent_BL, received_BL)
        if (
            self._deployment.dispatcher == "low_latency"
            and self._calibration.low_latency_network_only
        ):
            in_node = 1  # what stays in the node goes through the adapter too
        return {
            "network": busiest_BL * ((ranks - in_node) / ranks),
            "node": busiest_BL * ((in_node - 1) / ranks),
        }
