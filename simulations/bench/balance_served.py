"""How even ranks are on batches that no plan has seen.

A plan is made from the mean load and the deviation that a load window measured; every batch then has
its own load, and its tokens divide over the copies as well as they can.

B batches, L layers, E logical experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from router.load import ExpertLoad, LoadWindow
from router.placement import Placement
from router.split import LayerSplit
from simulations.bench.balance_planned import eplb_placement, planned_placement
from simulations.eplb import even_rank_loads
from simulations.workload import SHAPES, FloatArray, IntArray, planned_loads, served_counts

JITTERS = (0.0, 0.1, 0.2, 0.3, 0.5)
ASSIGNMENTS = 65536
NUM_LAYERS, NUM_BATCHES, PAST_BATCHES = 24, 8, 64
SEED = 20260


class Served:
    """A placement that serves batches, prepared once."""

    def __init__(self, placement: Placement) -> None:
        self.placement = placement
        self._splits = [LayerSplit(placement.layer(n)) for n in range(placement.num_layers)]

    def imbalance_L(self, counts_LE: IntArray) -> FloatArray:
        """max/mean over ranks in each layer, tokens divided over copies as well as can be."""
        pairs = zip(self._splits, counts_LE, strict=True)
        return np.array([split.imbalance(counts_E) for split, counts_E in pairs])


def even_imbalance_L(placement: Placement, counts_LE: IntArray) -> FloatArray:
    """max/mean over ranks in each layer, an expert's tokens divided evenly over its copies."""
    rank_LR = even_rank_loads(
        placement.physical_to_logical, counts_LE.astype(np.float64), placement.num_ranks
    )
    imbalance_L: FloatArray = rank_LR.max(axis=1) / rank_LR.mean(axis=1)
    return imbalance_L


def summary(imbalances: Sequence[FloatArray], prefix: str = "") -> dict[str, float]:
    """mean and p99 over all batches and layers."""
    values = np.concatenate(imbalances)
    return {
        f"{prefix}mean": float(values.mean()),
        f"{prefix}p99": float(np.quantile(values, 0.99)),
    }


def served(progress: Callable[[str], None]) -> dict[str, Any]:
    """<jitter>: mean and p99 of max/mean over layers and batches; eplb_*: EPLB, even division;
    eplb_split_*: EPLB's placement with our division; window_*: ours where the mean, too, is only
    what the window measured, not the true one."""
    report = {}
    shape, load_LE = SHAPES["C"], planned_loads("C", "logn1", NUM_LAYERS)
    load_LE = load_LE / load_LE.sum(axis=1, keepdims=True) * ASSIGNMENTS
    for jitter in JITTERS:
        progress(f"served with jitter {jitter}")
        rng = np.random.default_rng([SEED, int(jitter * 1000)])
        window = LoadWindow(NUM_LAYERS, shape.num_experts)
        for _ in range(PAST_BATCHES):
            window.add(_batch(rng, load_LE, jitter))
        measured = window.estimate()
        known = ExpertLoad(mean_LE=load_LE, sigma_LE=measured.sigma_LE)
        ours, theirs = Served(planned_placement(known, shape)), eplb_placement(load_LE, shape)
        ours_from_window = Served(planned_placement(measured, shape))
        split_theirs = Served(theirs)
        batches = [_batch(rng, load_LE, jitter) for _ in range(NUM_BATCHES)]
        report[str(jitter)] = {
            **summary([ours.imbalance_L(counts_LE) for counts_LE in batches]),
            **summary([even_imbalance_L(theirs, counts_LE) for counts_LE in batches], "eplb_"),
            **summary([split_theirs.imbalance_L(c) for c in batches], "eplb_split_"),
            **summary([ours_from_window.imbalance_L(c) for c in batches], "window_"),
        }
    return report


def _batch(rng: np.random.Generator, load_LE: FloatArray, jitter: float) -> IntArray:
    return np.stack([served_counts(rng, load_E, jitter, ASSIGNMENTS) for load_E in load_LE])
