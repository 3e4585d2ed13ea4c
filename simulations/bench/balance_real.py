"""Recorded routing, served in batches: the same task, tasks mixed, and one task after the other.

Arrays of a trace are tasks; tokens are served in the order of the trace. 16 ranks of 5 slots each.

B batches, L layers, T tokens, E logical experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from router.load import LoadWindow
from router.load_files import expert_counts
from router.placement import Placement
from router.planner import PlanOptions
from router.policy import Policy, PolicyOptions
from simulations.bench.balance_planned import eplb_placement, planned_placement, replanned
from simulations.bench.balance_served import Served, even_imbalance_L, summary
from simulations.bench.recorded import Ids, read_tasks
from simulations.workload import ClusterShape, FloatArray, IntArray

SHAPE = ClusterShape(num_experts=64, num_slots=80, num_nodes=4, ranks_per_node=4)
BATCH_TOKENS = 1024
SHIFT_BATCHES = 40
MOVES_PER_BATCH = 64
"""Of all layers together: four experts arrive at each rank while a batch runs."""
POLICY = PolicyOptions()
PLAN = PlanOptions(target=POLICY.target)
RECOVERED = 1.10
SEED = 20262


def real(trace: Path, progress: Callable[[str], None]) -> dict[str, Any]:
    """same_task: planned on the first half of each task, serving the second; mixed: the same of
    all tasks shuffled together; shift: planned on one task, serving another, tokens shuffled as in
    batches of many requests; shift_in_order: the same in the order of the trace (`shift` says what
    their keys mean). mean and p99 of max/mean over layers and batches; eplb_*: EPLB.

    Raises LoadFileError for a file that is no routing trace, ValueError for one that does not fit.
    """
    tasks = read_tasks(trace, num_experts=SHAPE.num_experts, least_tokens=2 * BATCH_TOKENS)
    progress("real: same task")
    same = [_halves(ids_TLK) for ids_TLK in tasks.values()]
    progress("real: mixed tasks")
    rng = np.random.default_rng(SEED)
    first, second = (
        np.concatenate([_half(ids_TLK, n) for ids_TLK in tasks.values()]) for n in (0, 1)
    )
    mixed = [(rng.permutation(first), rng.permutation(second))]
    report = {"same_task": _unseen(same), "mixed": _unseen(mixed)}
    if len(tasks) > 1:
        shuffled = {name: rng.permutation(ids_TLK) for name, ids_TLK in tasks.items()}
        report["shift"] = shift(shuffled, progress)
        report["shift_in_order"] = shift(tasks, progress)
    return report


def _half(ids_TLK: Ids, n: int) -> Ids:
    middle = len(ids_TLK) // 2
    return ids_TLK[n * middle : (n + 1) * middle]


def _halves(ids_TLK: Ids) -> tuple[Ids, Ids]:
    return _half(ids_TLK, 0), _half(ids_TLK, 1)


def _batches(ids_TLK: Ids) -> Iterator[IntArray]:
    """[L, E] counts of whole batches, in order."""
    for start in range(0, len(ids_TLK) - BATCH_TOKENS + 1, BATCH_TOKENS):
        yield expert_counts(ids_TLK[start : start + BATCH_TOKENS], SHAPE.num_experts)


def _window(ids_TLK: Ids) -> LoadWindow:
    window = LoadWindow(ids_TLK.shape[1], SHAPE.num_experts)
    for counts_LE in _batches(ids_TLK):
        window.add(counts_LE)
    return window


def _unseen(pairs: list[tuple[Ids, Ids]]) -> dict[str, float]:
    """Plan on the first of each pair, serve the second."""
    ours: list[FloatArray] = []
    theirs: list[FloatArray] = []
    for past_TLK, future_TLK in pairs:
        load = _window(past_TLK).estimate()
        served = Served(planned_placement(load, SHAPE))
        eplb = eplb_placement(load.mean_LE, SHAPE)
        for counts_LE in _batches(future_TLK):
            ours.append(served.imbalance_L(counts_LE))
            theirs.append(even_imbalance_L(eplb, counts_LE))
    return {**summary(ours), **summary(theirs, "eplb_")}


def shift(tasks: Mapping[str, Ids], progress: Callable[[str], None]) -> dict[str, Any]:
    """Every task after every other: decided, planned and moved while batches are served.

    mean and p99: of the batches from the first whose mean over layers is at most 1.10 again.
    batches: how many are served before that one, in the worst case, None if one never comes; above:
    the share of later ones that are above 1.10. moves: experts moved per layer; moves_per_batch: what
    may move while one batch is served. unmoved_mean: without moving any; eplb_mean: EPLB, not planned
    anew either.
    """
    parts: dict[str, list[FloatArray]] = {"settled": [], "unmoved": [], "eplb": []}
    batches, moves = [], []
    for name, past_TLK in tasks.items():
        for other in sorted(set(tasks) - {name}):
            progress(f"real: from {name} to {other}")
            window = _window(past_TLK)
            load = window.estimate()
            unmoved = Served(planned_placement(load, SHAPE))
            eplb = eplb_placement(load.mean_LE, SHAPE)
            cluster, series = Migrating(unmoved.placement, MOVES_PER_BATCH), []
            for counts_LE in _cycled(tasks[other], SHIFT_BATCHES):
                series.append(cluster.serve(counts_LE, window))
                parts["unmoved"].append(unmoved.imbalance_L(counts_LE))
                parts["eplb"].append(even_imbalance_L(eplb, counts_LE))
            batches.append(_first_low(series))
            parts["settled"] += series[batches[-1] :]
            moves.append(cluster.num_moves / window.num_layers)
    recovered = bool(parts["settled"])
    return {
        **(summary(parts["settled"]) if recovered else {"mean": None, "p99": None}),
        "batches": max(batches) if max(batches) < SHIFT_BATCHES else None,
        "above": float(np.mean([i.mean() > RECOVERED for i in parts["settled"]])),
        "moves": float(np.mean(moves)),
        "moves_per_batch": MOVES_PER_BATCH,
        "unmoved_mean": summary(parts["unmoved"])["mean"],
        "eplb_mean": summary(parts["eplb"])["mean"],
    }


def _first_low(series: list[FloatArray]) -> int:
    """The first batch that is even enough; their number if none is."""
    low = (n for n, imbalance_L in enumerate(series) if imbalance_L.mean() <= RECOVERED)
    return next(low, len(series))


def _cycled(ids_TLK: Ids, num_batches: int) -> Iterator[IntArray]:
    """Batches of consecutive tokens, from other starts when the trace begins again."""
    starts = np.arange(num_batches) * BATCH_TOKENS % (len(ids_TLK) - BATCH_TOKENS)
    for start in starts:
        yield expert_counts(ids_TLK[start : start + BATCH_TOKENS], SHAPE.num_experts)


class Migrating:
    """A cluster that serves batches and moves experts meanwhile, a layer at a time.

    A layer's new row is in force once all its experts have arrived, `moves_per_batch` of them while
    a batch is served; what is on its way is not reconsidered.
    """

    def __init__(self, placement: Placement, moves_per_batch: int) -> None:
        self.placement, self.moves_per_batch = placement, moves_per_batch
        self.num_moves = 0
        self._policy = Policy(POLICY)
        self._served = Served(placement)
        self._target, self._missing = placement, 0

    def serve(self, counts_LE: IntArray, window: LoadWindow) -> FloatArray:
        """Imbalances of this batch; then the window sees it, and experts move."""
        imbalance_L = self._served.imbalance_L(counts_LE)
        window.add(counts_LE)
        budget = self._advance(self.moves_per_batch)
        for layer in self._policy.decide(window, self.placement).layers if budget else ():
            self._start(layer, window)
            budget = self._advance(budget)
            if not budget:
                break
        self._served = Served(self.placement)
        return imbalance_L

    def _start(self, layer: int, window: LoadWindow) -> None:
        rows = replanned(window.estimate(), self.placement, [layer], PLAN)
        self._target = self.placement.with_layers(rows)
        self._missing = len(self._target.moves_from(self.placement))

    def _advance(self, budget: int) -> int:
        """Let up to `budget` experts of the layer on its way arrive; what is left of the budget."""
        moved = min(budget, self._missing)
        self._missing -= moved
        self.num_moves += moved
        if self._missing == 0:
            self.placement = self._target
        return budget - moved
