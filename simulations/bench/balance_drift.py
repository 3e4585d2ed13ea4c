"""Loads that drift: what is moved, and how even the ranks are afterwards.

Log-loads follow AR(1); there is one decision per step, made from what a load window measured, against
EPLB planned anew at every step from the true load.

L layers, E logical experts.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from typing import Any

import numpy as np

from router.load import LoadWindow
from router.planner import PlanOptions
from router.policy import Policy, PolicyOptions
from simulations.bench.balance_planned import eplb_placement, planned_placement, replanned
from simulations.bench.balance_served import Served, summary
from simulations.workload import SHAPES, FloatArray, drifting_loads

RHOS = (0.999, 0.99, 0.95)
NUM_LAYERS, NUM_STEPS = 12, 8
INTERVALS, INTERVAL_ASSIGNMENTS = 4, 64 * 65536
"""A step lasts so many readings of the counters, of 64 batches each."""
EXPERT_BYTES = 44_040_192
"""Of a DeepSeek-V3 expert in FP8."""
SEED = 20261
POLICY = PolicyOptions(bytes_per_expert=EXPERT_BYTES, bandwidth=1e9)


def drift(progress: Callable[[str], None]) -> dict[str, Any]:
    """<rho>: bytes_ratio, ours to EPLB's; imbalance: max/mean of the step's true load, best divided,
    after each decision, mean over layers and steps (p99 beside it); moves: experts per layer and
    step that are new to a rank, eplb_moves: EPLB's."""
    report = {}
    for rho in RHOS:
        progress(f"drift {rho}")
        report[str(rho)] = _drift(rho)
    return report


def _drift(rho: float) -> dict[str, float]:
    shape, policy = SHAPES["C"], Policy(POLICY)
    rng = np.random.default_rng([SEED, int(rho * 1000)])
    window = LoadWindow(NUM_LAYERS, shape.num_experts)
    steps = drifting_loads(rho, NUM_LAYERS, shape.num_experts)
    first_LE = next(steps)
    _observe(window, rng, first_LE)
    ours = planned_placement(window.estimate(), shape)
    theirs = eplb_placement(first_LE, shape)
    moves = eplb_moves = 0
    imbalances = []
    for load_LE in islice(steps, NUM_STEPS):
        _observe(window, rng, load_LE)
        layers = policy.decide(window, ours).layers
        rows = replanned(window.estimate(), ours, layers, PlanOptions(target=POLICY.target))
        before, ours = ours, ours.with_layers(rows)
        moves += len(ours.moves_from(before))
        before, theirs = theirs, eplb_placement(load_LE, shape)
        eplb_moves += len(theirs.moves_from(before))
        tokens_LE = np.rint(load_LE).astype(np.int64)
        imbalances.append(Served(ours).imbalance_L(tokens_LE))
    decisions = NUM_LAYERS * NUM_STEPS
    return {
        "bytes_ratio": moves / eplb_moves,
        "imbalance": summary(imbalances)["mean"],
        "p99": summary(imbalances)["p99"],
        "moves": moves / decisions,
        "eplb_moves": eplb_moves / decisions,
    }


def _observe(window: LoadWindow, rng: np.random.Generator, load_LE: FloatArray) -> None:
    for _ in range(INTERVALS):
        shares_LE = load_LE / load_LE.sum(axis=1, keepdims=True)
        window.add(rng.multinomial(INTERVAL_ASSIGNMENTS, shares_LE))
