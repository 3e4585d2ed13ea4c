"""Claims: figures against plain loops and closed forms, verdicts against their rules."""

from dataclasses import replace

import numpy as np
import pytest

from comms.topology import Topology
from router.gate import GateConfig
from simulations.balance.gate_routing import routed
from simulations.balance.load_balance import BalanceSpec, Trace, simulate
from simulations.claims import against_tensor_parallel as claim_tensor_parallel
from simulations.claims import balance as claim_balance
from simulations.claims.against_tensor_parallel import ratios
from simulations.claims.claims import CLAIMS, Study, rows_of
from simulations.claims.datasets import Dataset
from simulations.claims.parallel_curves import Curve
from simulations.claims.traffic import flat_bytes, traffic, traffic_row
from simulations.deployment import Deployment
from simulations.hardware.calibration import Calibration
from simulations.presets import load_model

H100 = Calibration.named("h100-published")
MOSAIC = load_model("mosaic")
NODES, PER_NODE = 2, 2
KEYS = {
    "id",
    "claim",
    "published",
    "baseline",
    "measured",
    "command",
    "verdict",
    "why",
    "figures",
    "warnings",
}


@pytest.fixture(scope="module")
def spec(tmp_path_factory) -> BalanceSpec:
    """All tokens choose alike in a layer, each layer differently: sampling them changes nothing."""
    rng = np.random.default_rng(5)
    chosen_LK = np.stack([rng.permutation(32)[:4] for _ in range(5)])
    path = tmp_path_factory.mktemp("trace") / "routing.npz"
    np.savez(path, task=np.broadcast_to(chosen_LK, (64, 5, 4)).astype(np.uint8))
    topology = Topology(num_nodes=NODES, ranks_per_node=PER_NODE, tensor_parallel_size=1)
    return BalanceSpec(
        model_name="mosaic",
        deployment=Deployment(model=MOSAIC, topology=topology, num_redundant_experts=4),
        calibration=H100,
        load=Trace(path=path),
        policies=("none", "eplb", "ours"),
        steps=3,
        tokens_per_rank=8,
        context=64,
    )


def rows_between_nodes(spec: BalanceSpec, per_expert: bool) -> float:
    """Of a token and layer in the mean, experts in order: 8 on each of 4 ranks."""
    chosen_LK = np.load(spec.load.path)["task"][0]
    rows = 0
    for source in range(NODES * PER_NODE):
        for chosen_K in chosen_LK:
            visited = [int(expert) // 8 // PER_NODE for expert in chosen_K]
            away = [node for node in visited if node != source // PER_NODE]
            rows += len(away) if per_expert else len(set(away))
    return rows / (NODES * PER_NODE * len(chosen_LK))


def test_traffic_is_what_plain_loops_count(spec) -> None:
    found = traffic(spec)["schemes"]
    hidden, top_k = MOSAIC.hidden_size, 4
    packed = top_k * (2 + 4)  # slots and weights of a row; an address where nodes forward it
    there = hidden + 4 * hidden // 128 + packed + 4
    rows = rows_between_nodes(spec, per_expert=False)
    assert found["node_fp8"]["none"]["rows"] == pytest.approx(rows)
    assert found["node_fp8"]["none"]["bytes"] == pytest.approx(rows * (there + 2 * hidden))
    flat = rows_between_nodes(spec, per_expert=True)
    assert found["flat_bf16"]["none"]["rows"] == pytest.approx(flat)
    assert found["flat_bf16"]["none"]["bytes"] == pytest.approx(
        flat * (2 * hidden + packed + 2 * hidden)
    )
    logfmt = hidden * 10 // 8 + 4 * hidden // 128
    assert found["node_fp8_logfmt"]["none"]["bytes"] == pytest.approx(rows * (there + logfmt))


def test_differences_are_what_plain_loops_count(spec) -> None:
    """All tokens want the same four experts: a rank has as many times all tokens as of these."""
    chosen_LK = np.load(spec.load.path)["task"][0]
    found = []
    for chosen_K in chosen_LK:
        of_rank = [sum(int(expert) // 8 == rank for expert in chosen_K) for rank in range(4)]
        found.append((max(of_rank) - min(of_rank)) / (sum(of_rank) / 4))
    none = simulate(spec)["policies"]["none"]
    for key in ("difference_mean", "planned_difference"):
        assert none[key] == pytest.approx(np.mean(found), rel=1e-5)
    assert none["difference_p99"] == pytest.approx(max(found))


def test_the_flat_baseline_is_its_closed_form(spec) -> None:
    assert flat_bytes(spec.deployment) == 4 * (1 / 2) * 2 * 2 * MOSAIC.hidden_size
    v3 = Deployment(
        model=load_model("deepseek-v3"),
        topology=Topology(num_nodes=8, ranks_per_node=8, tensor_parallel_size=1),
    )
    assert flat_bytes(v3) / 1024 == 196.0
    found = traffic(spec)
    for rows in found["schemes"].values():
        for row in rows.values():
            assert row["change"] == pytest.approx(row["bytes"] / found["flat_bytes"] - 1)


def test_the_gate_routes_by_its_groups_and_by_popularity() -> None:
    """Nodes that a token visits, besides its own: 3.47 of 7 where each has a group of DeepSeek-V3's
    experts (docs/communication.md), 4.63 by the closed form where groups are of one expert."""
    gate = load_model("deepseek-v3").gate
    ids_TK = routed(gate, num_layers=1, num_tokens=4000, popularity=0.0, seed=0)[:, 0]
    groups = [set(row) for row in (ids_TK // 32).tolist()]
    assert all(len(set(row)) == 8 for row in ids_TK.tolist())
    assert max(map(len, groups)) == 4
    assert np.mean([len(row) for row in groups]) * 7 / 8 == pytest.approx(3.47, abs=0.03)
    free = replace(gate, num_groups=1, num_groups_per_token=1)
    ids_TK = routed(free, num_layers=1, num_tokens=4000, popularity=0.0, seed=0)[:, 0]
    nodes = np.mean([len(set(row)) for row in (ids_TK // 32).tolist()])
    assert nodes * 7 / 8 == pytest.approx(4.63, abs=0.03)


def test_popularity_makes_loads_uneven_and_layers_differ() -> None:
    gate = GateConfig(num_experts=64, num_experts_per_token=4)

    def loads(popularity: float):
        ids_TLK = routed(gate, num_layers=2, num_tokens=3000, popularity=popularity, seed=1)
        return [np.bincount(ids_TLK[:, layer].ravel(), minlength=64) for layer in range(2)]

    even, uneven = loads(0.0)[0], loads(0.5)
    assert even.max() < 1.3 * even.mean()
    assert uneven[0].max() > 2 * uneven[0].mean()
    assert abs(np.corrcoef(uneven)[0, 1]) < 0.4


def line(start: float, slope: float, most: int) -> Curve:
    """A step takes start + slope * batch."""
    batches = np.arange(1.0, most + 1)
    return Curve(tokens_per_rank=batches, tpot_s=start + slope * batches)


def test_ratios_of_two_lines_by_hand() -> None:
    """E: 10 + b ms up to 100. T: 20 + 2 b ms up to 10: 40 ms, 250 tokens/s at its limit."""
    found = ratios(line(0.010, 0.001, 100), line(0.020, 0.002, 10))
    assert found["throughput_same_tpot"] == pytest.approx(30 / 0.040 / 250)
    assert found["throughput_half_tpot"] == pytest.approx(10 / 0.020 / 250)
    assert found["tpot_same_batch"] == pytest.approx(20 / 40)
    assert found["throughput_at_limits"] == pytest.approx(100 / 0.110 / 250, rel=1e-4)
    # 250 tokens/s: b / (10 + b) = 0.25, so b = 3.33 and 13.33 ms; straight between b = 3 and 4.
    assert found["tpot_same_throughput"] == pytest.approx(13.33 / 40, rel=0.01)


def test_what_a_curve_does_not_reach_is_none_and_zero() -> None:
    found = ratios(line(0.100, 0.001, 4), line(0.020, 0.002, 10))
    assert found["throughput_same_tpot"] == found["throughput_half_tpot"] == 0.0
    assert found["tpot_same_batch"] is None
    assert found["tpot_same_throughput"] is None


def test_verdicts_of_tensor_parallelism() -> None:
    verdict = claim_tensor_parallel._verdict
    assert verdict(True, True) == "reproduces"
    assert verdict(True, False) == verdict(False, True) == "partly"
    assert verdict(False, False) == "does not"


class Made(Dataset):
    """Policies that were not simulated."""

    def policies(self, changes=None):
        return changes or self.__dict__["main"]


def made(spec, **main):
    none = {
        "planned_difference": 1.0,
        "difference_mean": 2.0,
        "difference_p99": 3.0,
        "imbalance_mean": 2.5,
        "imbalance_p99": 3.5,
        "throughput": 100.0,
    }
    dataset = Made(title="made", spec=spec, loads={"main": {}}, flags=("--x",))
    rows = {"none": none, "eplb": none, "ours": {**none, **main}}
    object.__setattr__(dataset, "main", rows)
    return dataset


@pytest.mark.parametrize(
    ("ours", "verdict"),
    [
        ({"difference_p99": 0.09, "difference_mean": 0.05}, "reproduces"),
        ({"difference_p99": 0.09, "difference_mean": 0.11}, "partly"),  # as other loads may be
        ({"planned_difference": 0.01, "imbalance_mean": 1.02, "imbalance_p99": 1.05}, "partly"),
        ({"planned_difference": 0.01}, "does not"),
    ],
)
def test_verdicts_of_differences(spec, ours, verdict: str) -> None:
    row = claim_balance.difference_row(made(spec, **ours))
    assert row["verdict"] == verdict
    assert row["figures"]["main"]["none"]["excess_mean"] == 1.5


@pytest.mark.parametrize(
    ("rates", "verdict"),
    [((131.0, 90.0), "reproduces"), ((110.0, 140.0), "partly"), ((110.0, 110.0), "does not")],
)
def test_verdicts_of_throughput(spec, monkeypatch, rates, verdict: str) -> None:
    dataset = made(spec, throughput=rates[0])
    other = {**dataset.policies(), "ours": {"throughput": rates[1]}}
    monkeypatch.setattr(claim_balance, "BATCHES", {"small": {}, "large": other})
    row = claim_balance.throughput_row(dataset)
    assert row["verdict"] == verdict
    assert row["figures"]["by_batch"]["small"]["ours"]["over_none"] == rates[0] / 100 - 1


def test_a_row_of_recorded_routing(spec) -> None:
    dataset = Dataset(title="made", spec=spec, loads={"main": {}}, flags=("--preset", "mosaic"))
    row = traffic_row(dataset)
    assert set(row) == KEYS - {"id", "warnings"}
    change = row["figures"]["by_routing"]["recorded"]["schemes"]["node_fp8"]["ours"]["change"]
    assert f"ours {change:+.1%}" in row["measured"]
    assert (row["verdict"] == "reproduces") == (change <= -0.6)
    # All tokens choose the same four experts: all are on one node then, or copied to both.
    assert row["figures"]["node_aware"]["rows"] <= 0.5


def test_without_a_trace_recorded_rows_are_skipped_and_say_what_to_add() -> None:
    rows = list(rows_of(Study(calibration=H100, only=("difference",), steps=1)))
    assert [row["id"] for row in rows] == ["difference_drawn", "difference_recorded"]
    assert all(set(row) == KEYS for row in rows)
    assert rows[1]["verdict"] == "skipped"
    assert "--trace" in rows[1]["command"]
    assert rows[0]["figures"]["lognormal"]["ours"]["planned"] < 0.001


@pytest.mark.parametrize("wrong", [{"only": ("speed",)}, {"only": ()}, {"steps": 0}, {"seed": -1}])
def test_studies_that_cannot_be(wrong) -> None:
    with pytest.raises(ValueError, match=r"choose from|must be"):
        Study(calibration=H100, **wrong)
    assert len(CLAIMS) == 4


def test_curves_know_where_they_end() -> None:
    curve = line(0.010, 0.001, 10)
    assert curve.tpot_at(2.5) == pytest.approx(0.0125)
    assert np.isnan(curve.tpot_at(11))
    assert np.isnan(curve.tpot_at_throughput(1e9))
    assert curve.tpot_at_throughput(1.0) == pytest.approx(0.011)
    assert curve.throughput_within(1.0) == pytest.approx(10 / 0.020)
    assert curve.throughput_within(0.001) == 0.0
