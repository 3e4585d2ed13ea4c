"""Held-out errors are nothing where the tables follow the formulas, and show where they do not."""

import json

import numpy as np
import pytest

from simulations.hardware.calibration import Calibration
from simulations.hardware.fidelity import fidelity
from simulations.presets import load_model
from tests.simulations.calibrations import ROUND

ROWS = [2**i for i in range(12)]
SHAPES = [(2112, 7168), (7168, 16384), (4096, 7168), (7168, 2048), (256, 7168), (24576, 1536)]
MODEL = load_model("deepseek-v3")


def table(axes, values):
    return {"axes": axes, "unit": "s", "values": np.asarray(values).tolist()}


def calibration(tables):
    only = {
        "peak_flops": {"bfloat16": ROUND["peak_flops"]["bfloat16"]},
        "gemm": {"bfloat16": ROUND["gemm"]["bfloat16"]},
    }
    return Calibration.from_json(json.dumps({**ROUND, **only, "tables": tables}), "made up")


def product(n, k, scale=1.0):
    """As the cost model has it, with ROUND's constants."""
    seconds = []
    for rows in ROWS:
        flop, num_bytes = 2 * n * k * -(-rows // 32) * 32, 2 * n * k + 2 * rows * (n + k)
        seconds.append(scale * (2e-6 + max(flop / 5e14, num_bytes / 2e12)))
    return table({"tokens": ROWS}, seconds)


def test_power_laws_are_interpolated_exactly():
    rows = np.array(ROWS, dtype=float)
    found = fidelity(MODEL, calibration({"gate/256x7168": table({"tokens": ROWS}, rows**0.5)}), {})
    assert list(found) == ["sizes between those measured: rows"]
    assert found["sizes between those measured: rows"] == {"points": 4, "median": 0, "worst": 0}


def test_one_bump_is_one_worst_error():
    rows = np.array(ROWS, dtype=float)
    rows[4] *= 1.5  # the second of those held out: 1, 4, 7, 10
    found = fidelity(MODEL, calibration({"gate/256x7168": table({"tokens": ROWS}, rows)}), {})
    row = found["sizes between those measured: rows"]
    assert row["worst"] == pytest.approx(1 / 3, abs=1e-3)
    assert row["median"] == 0


def test_shapes_without_a_table_by_the_formula():
    tables = {f"gemm/bfloat16/{n}x{k}": product(n, k) for n, k in SHAPES}
    what = "shapes without a table: bfloat16 products"
    assert fidelity(MODEL, calibration(tables), {})[what]["median"] < 0.02
    tables["gemm/bfloat16/256x7168"] = product(256, 7168, scale=4.0)
    assert fidelity(MODEL, calibration(tables), {})[what]["worst"] == pytest.approx(0.75, abs=0.05)


def test_held_out_shapes_are_not_fitted_to():
    """Every third product three times as slow: nothing that the others say tells so."""
    tables = {
        f"gemm/bfloat16/{n}x{k}": product(n, k, scale=3.0 if i % 3 == 0 else 1.0)
        for i, (n, k) in enumerate(SHAPES)
    }
    found = fidelity(MODEL, calibration(tables), {})
    assert found["shapes without a table: bfloat16 products"]["worst"] > 0.6


def test_skewed_counts_are_predicted_expert_by_expert():
    """Seconds proportional to rows beyond 64: the sum over experts is known without the model."""
    rows, experts = [1, 64, 128, 256, 512, 1024], [1, 4, 32]
    values = np.outer(experts, np.maximum(rows, 64)) * 1e-6
    axes = {"experts": experts, "tokens_per_expert": rows}
    known = calibration({"grouped_gemm/bfloat16/7168x2048": table(axes, values)})
    seconds = {"256,64,64,128": 512e-6, "512,0,0,0": 512e-6, "128,128,128,128": 640e-6}
    row = fidelity(MODEL, known, {"bfloat16": seconds})["skewed counts: bfloat16 experts"]
    assert row == {"points": 3, "median": 0, "worst": pytest.approx(0.2, abs=1e-3)}
