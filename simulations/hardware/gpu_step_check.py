"""Decode steps of a few layers of a model on this GPU: what they take beyond the tables' parts.

Layers have random weights; of many experts only as many as a rank of a small cluster would have. The
layers' own time is the difference between two models of different depth, everything else is a step's.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from cluster.model.config import ModelConfig
from cluster.model.cuda.transformer import Quantization
from comms.topology import Topology
from simulations.bench.model_on_gpu import STEPS, ModelBench
from simulations.cost import CostModel, StepWork
from simulations.deployment import ComputeDtype, Deployment
from simulations.hardware.calibration import Calibration
from simulations.hardware.fit import rounded
from simulations.hardware.step_check import random_counts

SEQUENCES = (1, 16, 128)
CONTEXT = 128
DEPTHS = (1, 3)
MOST_EXPERTS = 64
ALONE = Topology(num_nodes=1, ranks_per_node=1)


def shortened(model: ModelConfig, layers: int) -> ModelConfig:
    """That many expert layers and no others, with at most MOST_EXPERTS experts."""
    experts = min(model.num_experts, MOST_EXPERTS)
    gate = replace(model.gate, num_experts=experts)
    return replace(model, num_layers=layers, moe_layers=tuple(range(layers)), gate=gate)


def measured_steps(
    model: ModelConfig, dtype: ComputeDtype, sequences: Sequence[int] = SEQUENCES
) -> list[dict[str, float]]:
    """[{"sequences", "layer_s", "rest_s"}]: of a step as the engine asks for it, inputs from the host and
    the chosen tokens back to it, what a layer takes and what belongs to none."""
    found: dict[int, list[dict[str, float]]] = {}
    for layers in DEPTHS:
        bench = _bench(model, dtype, layers)
        found[layers] = [bench.decode(number, CONTEXT, None) for number in sequences]
        del bench
        gc.collect()
        torch.cuda.empty_cache()
    few, many = DEPTHS
    rows = []
    for number, short, deep in zip(sequences, found[few], found[many], strict=True):
        layer_s = (deep["step_ms"] - short["step_ms"]) / 1000 / (many - few)
        rest_s = short["served_ms"] / 1000 - few * layer_s
        rows.append({"sequences": number, "layer_s": rounded(layer_s), "rest_s": rounded(rest_s)})
    return rows


def one_step(model: ModelConfig, dtype: ComputeDtype, sequences: int) -> None:
    """To have its kernels compiled."""
    _bench(model, dtype, 1).decode(sequences, CONTEXT, None)


def _bench(model: ModelConfig, dtype: ComputeDtype, layers: int) -> ModelBench:
    quantization: Quantization = "fp8" if dtype == "float8" else None
    return ModelBench(shortened(model, layers), quantization, bandwidth=1.0)


def overheads(
    model: ModelConfig,
    values: Mapping[str, Any],
    dtype: ComputeDtype,
    steps: Sequence[Mapping[str, float]],
) -> dict[str, float]:
    """{"step_s", "layer_s"}: medians over the steps of what the parts leave, at least nothing."""
    bare = _without_overheads(values)
    left = [
        (step["rest_s"] - predicted["head_s"], step["layer_s"] - predicted["layer_s"])
        for step in steps
        for predicted in [predict(model, bare, dtype, int(step["sequences"]))]
    ]
    step_s, layer_s = np.median(np.maximum(left, 0), axis=0)
    return {"step_s": rounded(float(step_s)), "layer_s": rounded(float(layer_s))}


def checks(
    model: ModelConfig,
    values: Mapping[str, Any],
    dtype: ComputeDtype,
    steps: Sequence[Mapping[str, float]],
) -> list[dict[str, Any]]:
    """A layer's predicted and measured microseconds at each number of sequences."""
    calibration = Calibration.from_json(json.dumps(values), values["name"])
    rows = []
    for step in steps:
        predicted_s = predict(model, calibration, dtype, int(step["sequences"]))["layer_s"]
        rows.append(
            {
                "dtype": dtype,
                "sequences": step["sequences"],
                "context": CONTEXT,
                "experts": shortened(model, 1).num_experts,
                "predicted_us": rounded(1e6 * predicted_s),
                "measured_us": rounded(1e6 * step["layer_s"]),
                "ratio": rounded(predicted_s / step["layer_s"]),
            }
        )
    return rows


def predict(
    model: ModelConfig, calibration: Calibration, dtype: ComputeDtype, sequences: int
) -> dict[str, float]:
    """{"layer_s", "head_s"} of one rank, with tokens routed at random."""
    small = shortened(model, 1)
    deployment = Deployment(model=small, topology=ALONE, weights=dtype)
    work = StepWork.decode([[sequences]], CONTEXT + STEPS / 2)
    times = CostModel(deployment, calibration).step(work, random_counts(small, sequences))
    layer_s = float(times.layers.total.mean()) + calibration.layer_s
    return {"layer_s": layer_s, "head_s": float(times.head_B.mean())}


def _without_overheads(values: Mapping[str, Any]) -> Calibration:
    bare = {**values, "overheads": {"step_s": 0.0, "layer_s": 0.0}}
    return Calibration.from_json(json.dumps(bare), values["name"])
