"""What measuring our own kernels rests on, where there is no GPU: counts, grids, links, steps taken apart."""

import json

import numpy as np
import pytest

from comms.topology import Topology
from simulations.cost import CostModel, StepWork
from simulations.deployment import Deployment
from simulations.hardware import calibrate
from simulations.hardware.calibrate import borrowed_values
from simulations.hardware.calibration import Calibration
from simulations.hardware.fit import fit_exchange
from simulations.hardware.gpu_grid import Grid
from simulations.hardware.gpu_timing import Timing
from simulations.presets import load_model
from tests.simulations.calibrations import ROUND, calibration

V3 = load_model("deepseek-v3")
QWEN = load_model("qwen3-235b")
ALONE = Topology(num_nodes=1, ranks_per_node=1)


def table(axes, values):
    return {"axes": axes, "unit": "s", "values": np.asarray(values).tolist()}


@pytest.mark.parametrize(
    ("number", "mean"), [(1, 1), (4, 1), (5, 3), (16, 100), (64, 7), (3, 4096)]
)
def test_counts_scatter_by_chance(number, mean):
    pytest.importorskip("triton")
    from simulations.hardware.own_experts import chance_counts

    counts = np.array(chance_counts(number, mean))
    assert len(counts) == number
    assert counts.sum() == number * mean
    assert counts.min() >= 1
    assert counts.std() <= 1.05 * mean**0.5
    if number > 10 and mean > 10:
        assert counts.std() > 0.85 * mean**0.5


def test_a_grid_reckons_what_does_not_fit():
    asked = []

    def time(experts, rows):
        asked.append((experts, rows))
        return Timing(p50=1.0 * experts * rows, p99=2.0 * experts * rows)

    grid = Grid(
        name="a",
        axes={"experts": (1, 4, 8), "rows": (2, 10, 20)},
        time=time,
        fits=lambda experts, rows: experts * rows <= 20,
    )
    found = grid.table()
    assert asked == [(1, 2), (1, 10), (1, 20), (4, 2), (8, 2)]
    assert found["values"] == [[2, 10, 20], [8, 40, 80], [16, 80, 160]]
    assert found["p99_over_p50"] == 2
    with pytest.raises(ValueError, match="not even the smallest"):
        Grid(name="b", axes={"x": (1,)}, time=time, fits=lambda _: False).table()


def exchange(alpha_s, beta, num_bytes):
    return {"bytes": num_bytes, "seconds": [alpha_s + n / beta for n in num_bytes]}


EXCHANGE = {
    "dispatch_float8": exchange(4e-6, 3e11, [1e5, 1e6, 3e7]),
    "dispatch_bfloat16": exchange(4e-6, 3e11, [2e5, 2e6, 6e7]),
    "combine_fixed": exchange(8e-6, 2e11, [2e5, 2e6, 6e7]),
    "combine_pairs": exchange(6e-6, 2.5e11, [2e5, 2e6, 6e7]),
}


def test_links_of_our_exchange():
    found = fit_exchange(EXCHANGE)
    assert found["dispatch"]["node"] == pytest.approx({"alpha_s": 4e-6, "beta": 3e11}, rel=1e-3)
    assert found["combine"]["node"] == pytest.approx({"alpha_s": 8e-6, "beta": 2e11}, rel=1e-3)


def test_notes_say_what_was_borrowed(monkeypatch):
    values, notes = borrowed_values({}, "library")
    assert "dispatch" not in values
    assert len(notes) == 2
    values, notes = borrowed_values({"exchange": EXCHANGE}, "ours")
    assert values["dispatch"]["node"]["alpha_s"] == pytest.approx(4e-6, rel=1e-3)
    assert "between two GPUs" in notes[-1]
    monkeypatch.setattr(calibrate, "EXCHANGE_FROM", "h200-measured")
    values, notes = borrowed_values({}, "ours")
    pair = Calibration.named("h200-measured")
    assert values["combine"]["node"]["beta"] == pair.combine["node"].beta
    assert (
        values["links"]["network"]["beta"]
        == Calibration.named("h100-published").links["network"].beta
    )
    assert "as in h200-measured" in notes[-1]


def test_absorbed_prompts_take_the_products_of_decode():
    """All products cost nothing but one: the latent's expansion, which absorbed maps do not need."""
    tables = {
        "gemm/float8/32768x512": table({"tokens": [1, 4096]}, [7.0, 7.0]),
        "bmm/bfloat16/128/512x128": table({"tokens": [1, 4096]}, [11.0, 11.0]),
    }
    work, slots = StepWork.prefill([[512]], 512), np.ones((1, 58, 256), dtype=np.int64)
    for absorbed, least in ((False, 7.0), (True, 11.0)):
        known = calibration(tables=tables, attention={"absorbed_prompts": absorbed})
        times = CostModel(Deployment(model=V3, topology=ALONE), known).step(work, slots)
        assert times.layers.attention == pytest.approx(least, abs=0.5)


def test_a_shared_expert_beside_the_others_is_looked_up():
    name = "shared_expert/float8/7168x2048"
    known = calibration(tables={name: table({"tokens": [1, 4096]}, [5.0, 5.0])})
    slots = np.ones((1, 58, 256), dtype=np.int64)
    times = CostModel(Deployment(model=V3, topology=ALONE), known).step(
        StepWork.decode([[16]], 128), slots
    )
    assert times.layers.shared == pytest.approx(5.0)


@pytest.mark.parametrize(
    ("size", "decode", "prefill"),
    [
        (1, "gqa_decode/bfloat16/64/4x128", "attention_prefill/64/4x128"),
        (8, "gqa_decode/bfloat16/8/1x128", "attention_prefill/8/1x128"),
    ],
)
def test_grouped_queries_have_tables(size, decode, prefill):
    grid = {"sequences": [1, 64], "context": [128, 4096]}
    tables = {
        decode: table(grid, np.full((2, 2), 3.0)),
        prefill: table({"tokens": [1, 4096]}, [4.0, 4.0]),
    }
    topology = Topology(num_nodes=1, ranks_per_node=size, tensor_parallel_size=size)
    known = calibration(tables=tables)
    cost = CostModel(Deployment(model=QWEN, topology=topology), known)
    slots = np.ones((1, QWEN.num_moe_layers, QWEN.num_experts), dtype=np.int64)
    found = [
        cost.step(StepWork.decode([[8]], 512), slots),
        cost.step(StepWork.prefill([[512]], 512), slots),
    ]
    assert [float(times.layers.attention[0, 0]) for times in found] == pytest.approx(
        [3, 4], abs=0.1
    )


def test_steps_are_taken_apart():
    """Measured layers and steps made of the predicted parts and known rests give these back."""
    pytest.importorskip("triton")
    from simulations.hardware.gpu_step_check import checks, overheads, predict

    values = json.loads(json.dumps(ROUND))
    bare = Calibration.from_json(
        json.dumps({**values, "overheads": {"step_s": 0.0, "layer_s": 0.0}}), "bare"
    )
    steps = []
    for sequences in (1, 16, 128):
        parts = predict(V3, bare, "float8", sequences)
        steps.append(
            {
                "sequences": sequences,
                "layer_s": parts["layer_s"] + 3e-6,
                "rest_s": parts["head_s"] + 2e-4,
            }
        )
    found = overheads(V3, values, "float8", steps)
    assert found == pytest.approx({"step_s": 2e-4, "layer_s": 3e-6}, rel=1e-3)
    rows = checks(V3, {**values, "overheads": found}, "float8", steps)
    assert [row["ratio"] for row in rows] == pytest.approx([1, 1, 1], rel=1e-3)
    steps = [{**step, "layer_s": 0.5 * step["layer_s"]} for step in steps]
    assert overheads(V3, values, "float8", steps)["layer_s"] == 0


def test_experts_by_how_many_have_tokens():
    """A launch of 10 s and a second for each row of each expert: whoever else is on the rank adds nothing."""
    experts, rows = [1, 2, 4, 8, 16, 32, 64, 128, 256], [1, 2, 4, 8]
    values = 10 + np.multiply.outer(experts, rows)
    axes = {"experts": experts, "tokens_per_expert": rows}
    known = calibration(tables={"active_experts/float8/7168x2048": table(axes, values)})
    cost = CostModel(Deployment(model=V3, topology=ALONE), known)
    slots = np.zeros((2, 58, 256), dtype=np.int64)
    slots[0, :, [3, 70, 71, 200]] = 4
    slots[1, :, 5] = 8
    seconds = cost.experts_seconds(slots)
    np.testing.assert_allclose(seconds[:, :, 0], [[26] * 58, [18] * 58], rtol=1e-5)
    assert (cost.experts_seconds(np.zeros((1, 58, 256), dtype=np.int64)) == 0).all()
