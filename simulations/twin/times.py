"""Times of a recorded run, measured and predicted: side by side, for people to judge.

B steps, D replicas of the attention, L layers with experts, R ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cluster.engine.plan import StepPlan
from simulations.cost import CostModel, StepTimes, StepWork
from simulations.deployment import Deployment
from simulations.hardware.calibration import Calibration
from simulations.twin.recording import Recording
from simulations.twin.replay_batches import recorded_plans

Seconds = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Times:
    """Medians over steps, in seconds, of what a step's slowest rank took; `name` "step": in all."""

    name: str
    measured_s: float
    predicted_s: float


def compare_times(recording: Recording, calibration: Calibration) -> tuple[list[Times], list[str]]:
    """Each part of a step and the whole, and what the cost model warns of.

    Raises ValueError for a run that it has no formats for.
    """
    model = CostModel(deployment_of(recording), calibration)
    plans = [
        of_replicas
        for step, of_replicas in zip(
            recording.arrays["steps"], recorded_plans(recording), strict=True
        )
        if step >= 0
    ]
    times = model.step(work_of(plans), recording.arrays["slot_tokens"].astype(np.float32))
    predicted, measured = _predicted(times), _measured(recording)
    rows = [
        Times(
            name=name,
            measured_s=float(np.median(measured[name])),
            predicted_s=float(np.median(predicted[name])),
        )
        for name in predicted
    ]
    return rows, model.warnings


def deployment_of(recording: Recording) -> Deployment:
    """Raises ValueError for what cannot be simulated."""
    config = recording.config
    if config.dtype != "bfloat16":
        raise ValueError(f"no costs of dtype {config.dtype}: only bfloat16 is measured")
    is_flat = config.comms.all2all_backend == "flat"
    return Deployment(
        model=recording.model,
        topology=config.parallel.topology,
        num_redundant_experts=config.experts.num_redundant_experts,
        weights="bfloat16",
        dispatch_dtype=config.comms.dispatch_dtype,
        combine_dtype=config.comms.combine_dtype,
        dispatcher="flat" if is_flat else "hierarchical",
    )


def work_of(plans: Sequence[Sequence[StepPlan]]) -> StepWork:
    """Of the plans of all replicas, by step. A single token of a sequence decodes."""
    work_BD4 = np.array([[_work(plan) for plan in of_replicas] for of_replicas in plans], float)
    tokens, kv_tokens, pairs, logits = np.moveaxis(work_BD4, 2, 0)
    return StepWork(
        tokens_BD=tokens, kv_tokens_BD=kv_tokens, pairs_BD=pairs, logits_BD=logits, has_prompts=True
    )


def _work(plan: StepPlan) -> tuple[int, int, int, int]:
    """Tokens, keys that decoding tokens read, (query, key) pairs, logits."""
    spans = [(item.start, item.start + len(item.token_ids)) for item in plan.items]
    read = sum(end for start, end in spans if end - start == 1)
    pairs = sum((end * (end + 1) - start * (start + 1)) // 2 for start, end in spans)
    return plan.num_tokens, read, pairs, len(plan.logit_items)


def _predicted(times: StepTimes) -> dict[str, Seconds]:
    layers = {
        name: getattr(times.layers, name).sum(axis=1)
        for name in ("attention", "gate", "dispatch", "experts", "shared", "combine")
    }
    return {
        "attention and dense layers": layers["attention"] + times.dense_B,
        "gate": layers["gate"],
        "dispatch": layers["dispatch"],
        "experts": layers["experts"] + layers["shared"],
        "combine": layers["combine"],
        "logits": times.head_B,
        "step": times.total_B,
    }


def _measured(recording: Recording) -> dict[str, Seconds]:
    phases, names = recording.arrays["phases"], recording.phase_names

    def slowest(wanted: Iterable[str]) -> Seconds:
        chosen = [i for i, name in enumerate(names) if name in wanted]
        return np.asarray(phases[:, :, chosen].sum(axis=2).max(axis=1))

    return {
        "attention and dense layers": slowest(("attention", "dense")),
        **{name: slowest((name,)) for name in ("gate", "dispatch", "experts", "combine", "logits")},
        "step": recording.arrays["seconds"].max(axis=1),
    }
