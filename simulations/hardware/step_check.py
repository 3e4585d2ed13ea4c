"""A decode step of the bundled model on 2 x 2 ranks of this machine: predicted, and run."""

from __future__ import annotations

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
from simulations.hardware.measure_cpu import BUNDLED, LAYOUT, bundled_config

SAMPLES = 64


def step_check(calibration: Calibration, sequences: int, steps: int) -> dict[str, Any]:
    """{"sequences", "context", "predicted_ms", "measured_ms", "ratio"}, with times by part in
    "parts_ms": {part: [predicted, measured]}.
    """
    report = bench_step.run(bundled_config(), sequences, steps)
    context = bench_step.PROMPT_TOKENS + bench_step.WARM_UP_STEPS + steps / 2
    model = ModelConfig.from_dir(BUNDLED)
    predicted = predict(model, calibration, LAYOUT, sequences, context)
    total_ms = sum(predicted.values())
    parts = {
        name: [round(ms, 3), round(report["results"][name]["ms"], 3)]
        for name, ms in predicted.items()
        if name in report["results"]
    }
    return {
        "sequences": sequences,
        "context": context,
        "predicted_ms": round(total_ms, 3),
        "measured_ms": round(report["step_ms"], 3),
        "ratio": round(total_ms / report["step_ms"], 3),
        "parts_ms": parts,
    }


def predict(
    model: ModelConfig, calibration: Calibration, layout: Topology, sequences: int, context: float
) -> dict[str, float]:
    """Mean milliseconds by part, with tokens routed at random."""
    deployment = Deployment(
        model=model, topology=layout, weights="bfloat16", dispatch_dtype="bfloat16"
    )
    work = StepWork.decode(np.full((1, layout.num_replicas), sequences), context)
    slots_BLS = _random_counts(model, sequences * layout.num_replicas)
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


def _random_counts(model: ModelConfig, tokens: int) -> np.ndarray[Any, Any]:
    """(token, expert) pairs of each expert, [B, L, E]."""
    generator = torch.Generator().manual_seed(0)
    gate = Gate(model.gate, torch.zeros(model.num_experts, 1))
    counts = []
    for _ in range(SAMPLES * model.num_moe_layers):
        logits_TE = torch.randn(tokens, model.num_experts, generator=generator)
        ids_TK, _ = gate.choose(logits_TE)
        counts.append(torch.bincount(ids_TK.flatten(), minlength=model.num_experts).numpy())
    return np.array(counts).reshape(SAMPLES, model.num_moe_layers, -1)
