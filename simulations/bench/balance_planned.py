"""How even plans are on the very load they were made for, and how long planning and splitting take.

L layers, N nodes, R ranks, E logical experts, C copies.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from router.load import ExpertLoad
from router.placement import Placement
from router.planner import PlanOptions, plan
from router.split import LayerSplit
from simulations.eplb import eplb, even_rank_loads
from simulations.workload import (
    NUM_LAYERS,
    SHAPES,
    WORKLOADS,
    ClusterShape,
    FloatArray,
    IntArray,
    planned_loads,
    served_counts,
)

PLAN_REPEATS, SPLIT_REPEATS = 7, 5


def planned_placement(load: ExpertLoad, shape: ClusterShape) -> Placement:
    """Our plan for a load on that cluster, from nothing."""
    return plan(
        load,
        num_ranks=shape.num_ranks,
        slots_per_rank=shape.slots_per_rank,
        ranks_per_node=shape.ranks_per_node,
    ).placement


def replanned(
    load: ExpertLoad, current: Placement, layers: Sequence[int], options: PlanOptions
) -> dict[int, IntArray]:
    """New rows for some layers, planned from those of `current`."""
    if not layers:
        return {}
    rows = plan(
        load,
        num_ranks=current.num_ranks,
        slots_per_rank=current.slots_per_rank,
        ranks_per_node=current.ranks_per_node,
        current=current,
        layers=layers,
        options=options,
    ).placement.physical_to_logical
    return {layer: rows[layer] for layer in layers}


def eplb_placement(load_LE: FloatArray, shape: ClusterShape) -> Placement:
    """EPLB's plan for the same."""
    return Placement(
        physical_to_logical=eplb(
            load_LE, shape.num_slots, shape.num_groups, shape.num_nodes, shape.num_ranks
        ),
        num_experts=shape.num_experts,
        num_ranks=shape.num_ranks,
        ranks_per_node=shape.ranks_per_node,
    )


def planned(num_layers: int, progress: Callable[[str], None]) -> dict[str, Any]:
    """<config>.<workload>: ours and eplb, max/mean over ranks; difference, (max - min)/mean, ours.

    Means over layers, tokens of the plan's own load as integers; `worst_difference`: of a layer.
    EPLB divides the tokens of an expert evenly over its copies, we as `router/split.py` does.
    """
    report: dict[str, Any] = {}
    for name, shape in SHAPES.items():
        report[name] = {}
        for workload in WORKLOADS:
            progress(f"planned {name} {workload}")
            load_LE = planned_loads(name, workload, num_layers)
            placement = planned_placement(ExpertLoad(mean_LE=load_LE), shape)
            tokens_LE = np.rint(load_LE).astype(np.int64)
            rank_LR = np.stack([rank_loads(placement, *layer) for layer in enumerate(tokens_LE)])
            theirs = eplb_placement(load_LE, shape).physical_to_logical
            eplb_LR = even_rank_loads(theirs, load_LE, shape.num_ranks)
            difference_L = np.ptp(rank_LR, axis=1) / rank_LR.mean(axis=1)
            report[name][workload] = {
                "ours": float((rank_LR.max(axis=1) / rank_LR.mean(axis=1)).mean()),
                "eplb": float((eplb_LR.max(axis=1) / eplb_LR.mean(axis=1)).mean()),
                "difference": float(difference_L.mean()),
                "worst_difference": float(difference_L.max()),
            }
    return report


def seconds(progress: Callable[[str], None]) -> dict[str, float]:
    """CPU seconds of one thread. plan: 58 layers of 256 experts on 64 ranks, the least of several;
    split: optimum and division by node of one layer and batch, the median."""
    progress("seconds")
    shape, load_LE = SHAPES["C"], planned_loads("C", "logn1", NUM_LAYERS)
    plan_s = []
    for _ in range(PLAN_REPEATS):
        start = time.thread_time()
        placement = planned_placement(ExpertLoad(mean_LE=load_LE), shape)
        plan_s.append(time.thread_time() - start)
    rng = np.random.default_rng(0)
    split_s: list[float] = []
    for layer, load_E in enumerate(load_LE[:16]):
        split = LayerSplit(placement.layer(layer))
        for _ in range(SPLIT_REPEATS):
            by_node_NE = rng.multinomial(
                65536 // shape.num_nodes,
                served_counts(rng, load_E, 0.1, 65536) / 65536,
                shape.num_nodes,
            )
            start = time.thread_time()
            split.optimum(by_node_NE.sum(axis=0))
            split.divide(by_node_NE)
            split_s.append(time.thread_time() - start)
    return {"plan": min(plan_s), "split": float(np.median(split_s))}


def rank_loads(placement: Placement, layer: int, counts_E: IntArray) -> IntArray:
    """[R] tokens of each rank when counts_E, all from node 0, divide over the copies."""
    layer_placement = placement.layer(layer)
    counts_NE = np.zeros((layer_placement.num_nodes, len(counts_E)), dtype=np.int64)
    counts_NE[0] = counts_E
    quotas_EC = LayerSplit(layer_placement).divide(counts_NE).sum(axis=0)
    slots_EC = layer_placement.logical_to_physical
    # An expert with fewer copies than the most has quotas of 0 at the end of its row.
    slot_rank_EC = np.maximum(slots_EC, 0) // placement.slots_per_rank
    rank_R = np.zeros(placement.num_ranks, dtype=np.int64)
    np.add.at(rank_R, slot_rank_EC, quotas_EC[:, : slots_EC.shape[1]])
    return rank_R
