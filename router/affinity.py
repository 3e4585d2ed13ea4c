"""Placements for which tokens cross few nodes: experts that are chosen together live together.

First each expert gets its nodes (node_sets.py), then each copy a rank of its node. Ranks are kept
even so that batches can be divided well (node_packing.py).

E logical experts, M sampled tokens, K experts per token, N nodes, R ranks, S slots of all ranks.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from router.node_packing import pack
from router.node_sets import Demand, find_node_sets
from router.placement import IntArray

_MAX_TOKENS = 2048  # of the sample, spread over it


def plan_layer(
    mean_E: NDArray[np.float64],
    rows_MK: NDArray[np.integer],
    *,
    num_nodes: int,
    ranks_per_node: int,
    slots_per_rank: int,
    weight: float = 1.0,
) -> IntArray:
    """physical_to_logical [S] of one layer, -1 where a slot stays empty.

    mean_E: tokens of each expert, in any unit. rows_MK: sampled tokens' experts, -1 = none.
    weight: of node visits against even nodes; 1 counts what an uneven node costs in visits.
    Deterministic. On one core about half a second for 64 experts on 4 nodes x 4 ranks, five for 256
    on 8 x 8. Raises ValueError for sizes that do not fit, or without tokens.
    """
    slots, chosen_EM = num_nodes * ranks_per_node * slots_per_rank, _chosen(rows_MK, len(mean_E))
    if num_nodes < 2 or len(mean_E) > slots:
        raise ValueError(
            f"{len(mean_E)} experts and num_nodes({num_nodes}) * ranks_per_node({ranks_per_node}) "
            f"* slots_per_rank({slots_per_rank}): needs 2 nodes or more, and a slot for each expert"
        )
    load_E = mean_E / mean_E.sum() if mean_E.any() else np.full(len(mean_E), 1 / len(mean_E))
    demand = Demand(
        load=load_E.tolist(),
        chosen=[_bits(chosen_M) for chosen_M in chosen_EM],
        num_tokens=chosen_EM.shape[1],
        pairs_per_token=float(chosen_EM.sum() / chosen_EM.shape[1]),
        num_nodes=num_nodes,
        ranks_per_node=ranks_per_node,
        slots_per_rank=slots_per_rank,
        weight=weight,
    )
    return np.array(pack(find_node_sets(demand), demand), dtype=np.int64)


def _chosen(rows_MK: NDArray[np.integer], num_experts: int) -> NDArray[np.bool_]:
    """[E, M]: which of the sampled tokens, at most _MAX_TOKENS of them, chose each expert."""
    if rows_MK.ndim != 2 or not len(rows_MK) or rows_MK.min() < -1 or rows_MK.max() >= num_experts:
        raise ValueError(
            f"rows_MK must be sampled tokens [M > 0, K] of expert ids in [-1, {num_experts}), got "
            f"shape {list(rows_MK.shape)}"
        )
    used = np.linspace(0, len(rows_MK) - 1, min(len(rows_MK), _MAX_TOKENS)).astype(np.int64)
    chosen_ME = np.zeros((len(used), num_experts + 1), dtype=np.bool_)
    np.put_along_axis(chosen_ME, rows_MK[used].astype(np.int64), True, axis=1)
    return chosen_ME[:, :num_experts].T


def _bits(chosen_M: NDArray[np.bool_]) -> int:
    return int.from_bytes(np.packbits(chosen_M).tobytes(), "big")
