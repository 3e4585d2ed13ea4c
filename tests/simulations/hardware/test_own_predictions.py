"""Our own GPU benchmarks, predicted from tables of single kernels: no number of them is in the tables.

The benchmarks' files are those of docs/gpu/; errors are stated in docs/simulation.md.
"""

import json
from pathlib import Path

import numpy as np
import pytest

from comms.topology import Topology
from simulations.cost import CostModel, StepWork
from simulations.deployment import Deployment
from simulations.hardware.calibration import NAMES, Calibration
from simulations.hardware.step_check import random_counts
from simulations.presets import load_model

NAME = "h200-ours"
RESULTS = Path(__file__).parents[3] / "docs" / "gpu"
CARDS = Topology(num_nodes=8, ranks_per_node=8, tensor_parallel_size=1)
LITE, V3 = load_model("deepseek-v2-lite"), load_model("deepseek-v3")

pytestmark = pytest.mark.skipif(NAME not in NAMES, reason=f"no calibration {NAME}")


def predicted_decode(ranks, dtype, sequences, context):
    """Seconds of a step of V2-Lite in a graph (without what the host does), on one or two GPUs."""
    known = Calibration.named(NAME)
    wire = "float8" if dtype == "float8" else "bfloat16"
    deployment = Deployment(
        model=LITE,
        topology=Topology(num_nodes=1, ranks_per_node=ranks, tensor_parallel_size=1),
        weights=dtype,
        dispatch_dtype=wire,
    )
    work = StepWork.decode(np.full((1, ranks), sequences / ranks), context + 12)
    times = CostModel(deployment, known).step(work, random_counts(LITE, sequences))
    return float(times.total_B.mean()) - known.step_s


def predicted_layer(dtype, tokens, pairs_of_layers):
    """Seconds of an expert layer of V3 on one of 64 cards, without the wire: {part: seconds}."""
    deployment = Deployment(model=V3, topology=CARDS, weights=dtype)
    cost = CostModel(deployment, Calibration.named(NAME))
    slots = np.zeros((len(pairs_of_layers), V3.num_moe_layers, V3.num_experts), dtype=np.int64)
    slots[:, :, :4] = np.array(pairs_of_layers)[:, None, :]
    layers = cost.step(StepWork.decode([[tokens]], 128), slots).layers
    return {
        "gate": float(layers.gate.mean()),
        "shared": float(layers.shared.mean()),
        "experts": float(layers.experts.mean()),
    }


def decode_cases():
    for file, ranks in (("decode.json", 1), ("decode-2-gpus.json", 2)):
        report = json.loads((RESULTS / file).read_text())
        for name, results in report["results"].items():
            dtype = {"bfloat16": "bfloat16", "fp8": "float8"}.get(name)
            for sequences, row in results["decode"].items() if dtype else ():
                yield ranks, dtype, int(sequences), report["context"], row["step_ms"]


def layer_cases():
    for report in json.loads((RESULTS / "layer.json").read_text())["reports"]:
        for case in report["cases"]:
            yield report["dtype"], case["tokens"], case["counts"], case["layer_us"]


@pytest.mark.parametrize(("ranks", "dtype", "sequences", "context", "ms"), list(decode_cases()))
def test_decode_of_v2_lite(ranks, dtype, sequences, context, ms):
    predicted = 1000 * predicted_decode(ranks, dtype, sequences, context)
    print(
        f"{ranks} GPU, {dtype}, {sequences}: {predicted:.2f} for {ms:.2f}, {predicted / ms - 1:+.1%}"
    )
    assert abs(predicted / ms - 1) < 0.4


@pytest.mark.parametrize(("dtype", "tokens", "counts", "us"), list(layer_cases()))
def test_expert_layer_of_v3(dtype, tokens, counts, us):
    parts = {name: 1e6 * s for name, s in predicted_layer(dtype, tokens, counts).items()}
    predicted = sum(parts.values())
    print(f"{dtype}, {tokens}: {predicted:.1f} for {us:.1f}, {predicted / us - 1:+.1%}, {parts}")
    assert abs(predicted / us - 1) < 0.4
