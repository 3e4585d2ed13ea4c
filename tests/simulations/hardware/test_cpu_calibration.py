"""A calibration of this machine at tiny sizes: measured, fitted, checked, and good for predictions."""

import json

import numpy as np
import pytest

from comms.topology import Topology
from simulations.cost import CostModel, StepWork
from simulations.deployment import Deployment
from simulations.hardware import calibrate
from simulations.hardware.calibration import Calibration
from simulations.hardware.cpu_tables import cpu_tables, exchange_links
from simulations.hardware.cpu_timing import Windows
from simulations.hardware.measure_cpu import Sizes
from simulations.presets import load_model
from simulations.times.step_work import Sends

TINY = Sizes(
    rows=(1, 8),
    experts=(1, 8),
    tokens_per_expert=(1, 4),
    sequences=(1, 4),
    contexts=(16, 64),
    prompts=(16, 64),
    tokens=(1, 8),
    messages=(1024, 65536),
    tensor_parallel_sizes=(2,),
    windows=Windows(seconds=0.002, number=1, rounds=2),
    steps=2,
    check_sequences=(2,),
)
MOSAIC = load_model("mosaic")


@pytest.fixture(scope="module")
def values():
    return calibrate.cpu_calibration(
        MOSAIC, name="here", command="test", quick=True, say=lambda part: None, sizes=TINY
    )


def test_file_can_be_read_back(values, tmp_path):
    written = calibrate.write(tmp_path / "here.json", values)
    read = Calibration.from_file(tmp_path / "here.json")
    assert read.hash == written.hash
    assert read.name == "here"
    assert read.provenance["source"] == "measured by expertmesh calibrate"
    assert [file.name for file in tmp_path.iterdir()] == ["here.json"]


def test_every_lookup_of_the_cost_model_is_measured(values):
    """On the layout that was measured, nothing is left to a formula but links and overheads."""
    known = Calibration.from_json(json.dumps(values), "here")
    names = set(known.tables)
    assert {"gate/32x256", "elementwise/attention/256", "grouped_gemm/bfloat16/256x64"} <= names
    assert {"mla_decode/bfloat16/2x160", "attention_prefill/2x128"} <= names  # of two heads
    assert {"gemm/bfloat16/288x256", "bmm/bfloat16/2/128x32"} <= names
    layout = Topology(num_nodes=2, ranks_per_node=2)
    deployment = Deployment(model=MOSAIC, topology=layout, weights="bfloat16")
    cost = CostModel(deployment, known)
    slots = np.ones((1, MOSAIC.num_moe_layers, MOSAIC.num_experts), dtype=np.int64)
    times = cost.step(StepWork.decode([[2, 2]], 32), slots)
    assert cost.warnings == []
    assert 1e-4 < float(times.total_B[0]) < 10


def test_a_step_is_predicted_and_run(values):
    (check,) = values["measured"]["step"]
    assert check["measured_ms"] > 0
    assert check["ratio"] == pytest.approx(check["predicted_ms"] / check["measured_ms"], rel=0.01)


def test_attention_core_is_the_whole_less_its_other_parts():
    """mosaic's attention on one of two ranks: 4 whole products, two maps for each of two heads."""
    rows, contexts = (1, 8), (16, 64)
    parts = {
        "elementwise/attention/256": 1.0,
        "gemm/bfloat16/288x256": 2.0,
        "gemm/bfloat16/128x128": 4.0,
        "bmm/bfloat16/2/128x32": 8.0,
        "bmm/bfloat16/2/64x128": 16.0,
        "gemm/bfloat16/256x128": 32.0,
        "gemm/bfloat16/192x128": 64.0,  # prompts' only
    }
    times = {(name, (t,)): seconds for name, seconds in parts.items() for t in rows}
    times["elementwise/attention/256", (8,)] = 11.0
    whole = {(1, 16): 163.0, (1, 64): 263.0, (8, 16): 63.5, (8, 64): 373.0}
    times |= {("attention/decode/2", sizes): seconds for sizes, seconds in whole.items()}
    times |= {("attention/prefill/2", (8,)): 213.0}
    tables = cpu_tables(MOSAIC, times)
    decode = np.array(tables["mla_decode/bfloat16/2x160"]["values"])
    least = 0.05 * 63.5  # never nothing, whatever noise says
    np.testing.assert_allclose(decode, [[100, 200], [least, 300]], rtol=1e-3)
    assert tables["mla_decode/bfloat16/2x160"]["axes"] == {
        "sequences": list(rows),
        "context": list(contexts),
    }
    assert tables["attention_prefill/2x128"]["values"] == [100.0]


def test_links_of_an_exchange_add_up():
    """Times made of two stages are taken apart again."""
    layout = Topology(num_nodes=2, ranks_per_node=2)
    one_node = Topology(num_nodes=1, ranks_per_node=4)
    row, tokens = 512, (1, 16, 256)

    def node_s(topology, t, share):
        return 1e-4 + t * Sends.uniform(MOSAIC, topology).ranks_per_token_L[0] * share * row / 1e8

    def network_s(t):
        return 3e-4 + t * Sends.uniform(MOSAIC, layout).nodes_per_token_L[0] * row / 2e7

    stages = ("dispatch", "combine")
    inside = {(stage, (t,)): node_s(one_node, t, 3 / 4) for stage in stages for t in tokens}
    across = {
        (stage, (t,)): node_s(layout, t, 1 / 2) + network_s(t) for stage in stages for t in tokens
    }
    found = exchange_links(MOSAIC, layout, across, one_node, inside)
    assert found["dispatch"]["node"] == pytest.approx({"alpha_s": 1e-4, "beta": 1e8}, rel=2e-3)
    assert found["dispatch"]["network"] == pytest.approx({"alpha_s": 3e-4, "beta": 2e7}, rel=2e-2)
