"""A decode step of the bundled model on 2 x 2 ranks of this machine: predicted, and run."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from cluster.model.config import ModelConfig
from comms.topology import Topology
from router.gate import Gate
from simulations.bench import bench_step
from simulations.cost import CostModel, StepWork
from simulations.deployment import Deployment
from simulations.hardware.calibration import Calibration
from simulations.hardware.fit import rounded
from simulations.hardware.measure_cpu import BUNDLED, LAYOUT, bundled_config

SAMPLES = 64
RUNS = 3
"""Of which the fastest counts: what else runs on the machine only adds."""


def fit_overheads(calibration: Calibration, steps: int) -> dict[str, float]:
    """{"step_s", "layer_s"} from a run with one sequence per replica.

    step_s: scheduling, broadcast and sampling. layer_s: what the step takes beyond that and all
    predicted parts, divided over the layers; mostly ranks that wait for each other to get a core.
    """
    bare = replace(calibration, step_s=0.0, layer_s=0.0)
    report, context = _run(1, steps)
    model = ModelConfig.from_dir(BUNDLED)
    step_ms = sum(report["results"][name]["ms"] for name in ("schedule", "broadcast", "sample"))
    predicted_ms = sum(predict(model, bare, LAYOUT, 1, context).values())
    rest_ms = max(0.0, report["step_ms"] - step_ms - predicted_ms)
    return {
        "step_s": rounded(step_ms / 1000),
        "layer_s": rounded(rest_ms / 1000 / model.num_layers),
    }


def check_step(calibration: Calibration, sequences: int, steps: int) -> dict[str, Any]:
    """{"sequences", "context", "predicted_ms", "measured_ms", "ratio"}, with times by part in
    "parts_ms": {part: [predicted, measured]}.
    """
    report, context = _run(sequences, steps)
    model = ModelConfig.from_dir(BUNDLED)
    predicted = predict(model, calibration, LAYOUT, sequences, context)
    total_ms = sum(predicted.values())
    parts = {
        name: [rounded(ms), rounded(report["results"][name]["ms"])]
        for name, ms in predicted.items()
        if name in report["results"]
    }
    return {
        "sequences": sequences,
        "context": context,
        "predicted_ms": rounded(total_ms),
        "measured_ms": rounded(report["step_ms"]),
        "ratio": rounded(total_ms / report["step_ms"]),
        "parts_ms": parts,
    }


def _run(sequences: int, steps: int) -> tuple[dict[str, Any], float]:
    """The fastest of some runs, and the mean context of its steps."""
    reports = [bench_step.run(bundled_config(), sequences, steps) for _ in range(RUNS)]
    context = bench_step.PROMPT_TOKENS + bench_step.WARM_UP_STEPS + steps / 2
    return min(reports, key=lambda report: float(report["step_ms"])), context


def predict(
    model: ModelConfig, calibration: Calibration, layout: Topology, sequences: int, context: float
) -> dict[str, float]:
    """Mean milliseconds by part, with tokens routed at random."""
    deployment = Deployment(
        model=model, topology=layout, weights="bfloat16", dispatch_dtype="bfloat16"
    )
    work = StepWork.decode(np.full((1, layout.num_replicas), sequences), context)
    slots_BLS = random_counts(model, sequences * layout.num_replicas)
    times = CostModel(deployment, calibration).step(work, slots_BLS)
    moe = times.layers
    seconds = {
        "attention": moe.attention.sum(axis=-1),
        "gate": moe.gate.sum(axis=-1),
        "dispatch": moe.dispatch.sum(axis=-1),
        "experts": (moe.experts + moe.shared).sum(axis=-1),
        "combine": moe.combine.sum(axis=-1),
    }
    rest = times.total_B - np.sum(list(seconds.values()), axis=0)
    return {name: 1000 * float(s.mean()) for name, s in {**seconds, "rest": rest}.items()}


def random_counts(model: ModelConfig, tokens: int) -> np.ndarray[Any, Any]:
    """(token, expert) pairs of each expert, [B, L, E]."""
    generator = torch.Generator().manual_seed(0)
    gate = Gate(model.gate, torch.zeros(model.num_experts, 1))
    counts = []
    for _ in range(SAMPLES * model.num_moe_layers):
        logits_TE = torch.randn(tokens, model.num_experts, generator=generator)
        ids_TK, _ = gate.choose(logits_TE)
        counts.append(torch.bincount(ids_TK.flatten(), minlength=model.num_experts).numpy())
    return np.array(counts).reshape(SAMPLES, model.num_moe_layers, -1)
