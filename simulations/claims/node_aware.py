"""What a plan and a split that mind node traffic save: `node_traffic` plans, `experts.split: nodes`.

Experts that are chosen together are placed together, from the first half of the tokens; of the second
half each token prefers copies on nodes that it visits anyway, as ranks of a cluster choose them
(`balance_sends.py`). In a few layers: such a plan takes seconds for a layer of 256 experts.

T tokens, L layers, K experts per token.
"""

from __future__ import annotations

import numpy as np

from router.visits import NodeChoice
from simulations.bench.balance_sends import (
    batches,
    choose_by_nodes,
    mean_of,
    placed_by_affinity,
    serve,
)
from simulations.bench.recorded import Ids
from simulations.deployment import Deployment
from simulations.traffic import wire_rows
from simulations.workload import ClusterShape

NUM_LAYERS = 2


def node_aware(deployment: Deployment, ids_TLK: Ids, tokens_per_rank: int) -> dict[str, float]:
    """rows: that cross, of a token and layer; bytes; imbalance: max / mean over ranks, of batches of
    so many tokens. Raises ValueError for fewer tokens than two batches."""
    topology, experts = deployment.topology, deployment.model.num_experts
    size = tokens_per_rank * topology.world_size
    half = len(ids_TLK) // 2
    if half < size:
        raise ValueError(f"{len(ids_TLK)} tokens are fewer than two batches of {size}")
    shape = ClusterShape(
        num_experts=experts,
        num_slots=deployment.num_slots,
        num_nodes=topology.num_nodes,
        ranks_per_node=topology.ranks_per_node,
    )
    served = []
    for layer in np.linspace(0, ids_TLK.shape[1] - 1, NUM_LAYERS).astype(int):
        ids_TK = ids_TLK[:, layer].astype(np.int64)
        load_E = np.bincount(ids_TK[:half].ravel(), minlength=experts).astype(np.float64)
        placed = placed_by_affinity(load_E, ids_TK[:half], shape)
        choose = choose_by_nodes(NodeChoice(placed))
        future = batches(ids_TK[half:], size, topology.world_size)
        served.append(mean_of(serve(placed, choose, batch) for batch in future))
    rows, imbalance = mean_of(served)
    wire = wire_rows(deployment)
    return {
        "rows": rows,
        "bytes": rows * (wire.dispatch_exchange + wire.combine_exchange),
        "imbalance": imbalance,
    }
