"""Runs of `simulate balance`: against plain loops over production code, and against known figures."""

import json
import math
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from comms.topology import Topology
from deploy.cli import app
from router.placement import Placement
from router.split import LayerSplit
from simulations.balance.load_balance import (
    BalanceSpec,
    Trace,
    make_loads,
    simulate,
    spare_slot_each,
)
from simulations.balance.load_shares import Workload
from simulations.balance.policies import POLICIES
from simulations.balance.run_record import PARTS, Recorder
from simulations.balance.sampled_traffic import LayerTraffic
from simulations.cost import CostModel, LayerTimes, StepWork
from simulations.deployment import Deployment
from simulations.eplb import eplb, even_rank_loads
from simulations.hardware.calibration import Calibration
from simulations.presets import load_model

CALIBRATION = Calibration.named("h100-published")


def spec_of(nodes=2, per_node=2, preset="mosaic", tp=1, redundant=None, **more):
    model = load_model(preset)
    topology = Topology(num_nodes=nodes, ranks_per_node=per_node, tensor_parallel_size=tp)
    spare = spare_slot_each(model, topology) if redundant is None else redundant
    options = {"steps": 30, "tokens_per_rank": 16, "context": 64, "interval": 10}
    return BalanceSpec(
        model_name=preset,
        deployment=Deployment(model=model, topology=topology, num_redundant_experts=spare),
        calibration=CALIBRATION,
        **{"load": Workload(), **options, **more},
    )


def without_speed(result):
    return {key: value for key, value in result.items() if key != "steps_per_s"}


# Against plain loops ----------------------------------------------------------------------------


def served(spec, name, placement, counts_TLE):
    """[T, L, S] tokens of each slot by one batch and layer after the other."""
    slots = np.zeros((*counts_TLE.shape[:2], placement.num_slots))
    for step, counts_LE in enumerate(counts_TLE):
        for layer, counts_E in enumerate(counts_LE):
            copies, row = placement.layer(layer), placement.physical_to_logical[layer]
            if name == "ours":
                quotas = LayerSplit(copies).by_copy(counts_E)
                held = copies.logical_to_physical >= 0
                slots[step, layer, copies.logical_to_physical[held]] = quotas[held]
                continue
            for expert, count in enumerate(counts_E):
                if name == "static":
                    for rank in range(placement.num_ranks):
                        slot = int(copies.choose_slots(torch.tensor([expert]), rank)[0])
                        slots[step, layer, slot] += count / placement.num_ranks
                else:
                    slots[step, layer, row == expert] += count / (row == expert).sum()
    return slots


@pytest.mark.parametrize("name", POLICIES)
def test_a_short_run_by_plain_loops(name):
    """Before anything moves: imbalances, loads, stragglers, times."""
    spec = spec_of(policies=(name,), load=Workload(name="zipf", jitter=0.3), interval=20)
    row = simulate(spec)["policies"][name]
    counts = make_loads(spec, 0).counts(0, 50)[:, 0]
    warm_up, counts = counts[:20], counts[20:]
    model, ranks = spec.deployment.model, 4
    if name == "none":
        rows = np.arange(model.num_experts).reshape(ranks, -1)
        rows = np.pad(rows, ((0, 0), (0, 1)), constant_values=-1).ravel()
        placement = placement_of(spec, np.tile(rows, (model.num_moe_layers, 1)))
    elif name.startswith("eplb"):
        mean = warm_up.sum(axis=0) / 4.0
        placement = placement_of(spec, eplb(mean, spec.deployment.num_slots, 1, 2, ranks))
    else:
        from router.load import LoadWindow
        from router.planner import plan

        window = LoadWindow(*warm_up.shape[1:], horizon=50, sample_tokens=0)
        for look in range(4):
            window.add(warm_up[5 * look : 5 * look + 5].sum(axis=0))
        placement = plan(
            window.estimate(),
            num_ranks=ranks,
            slots_per_rank=spec.deployment.slots_per_rank,
            ranks_per_node=2,
        ).placement
    slots = served(spec, name, placement, counts)
    rank = slots.reshape(30, -1, ranks, spec.deployment.slots_per_rank).sum(axis=3)
    imbalance = rank.max(axis=2) / rank.mean(axis=2)
    assert row["rebalances"] == []
    assert row["imbalance_mean"] == pytest.approx(imbalance.mean(), rel=1e-5)
    assert row["imbalance_p99"] == pytest.approx(np.quantile(imbalance, 0.99), rel=1e-5)
    if name.startswith("eplb"):
        of_eplb = even_rank_loads(placement.physical_to_logical, counts[3] / 1.0, ranks)
        assert rank[3] == pytest.approx(of_eplb)
    if name != "ours":  # whose ties between slots may be broken differently
        first, last = (part.sum(axis=0) for part in (rank[:3], rank[-3:]))
        for part, found in ((first, "before"), (last, "after")):
            expected = part / part.mean(axis=1, keepdims=True)
            assert np.array(row["rank_load_LR"][found]) == pytest.approx(expected, rel=1e-4)
        fullest = np.isclose(rank, rank.max(axis=2, keepdims=True))
        often = (fullest / fullest.sum(axis=2, keepdims=True)).mean(axis=(0, 1))
        assert row["straggler"]["rank"] == often.argmax()
        assert row["straggler"]["share"] == pytest.approx(often.max(), rel=1e-5)
        cost = CostModel(spec.deployment, CALIBRATION)
        work = StepWork.decode(16, 64)
        ours = cost.experts_seconds(slots.astype(np.float32)).max(axis=2)
        assert row["layer_ms"]["experts"] == pytest.approx(1e3 * ours.mean(), rel=1e-4)
        dense = cost.step(work, slots.astype(np.float32)).layers.attention
        assert row["layer_ms"]["attention"] == pytest.approx(1e3 * dense.mean(), rel=1e-4)
    assert row["throughput"] == pytest.approx(64 / row["step_ms_mean"] * 1e3, rel=1e-4)
    assert row["node_rows_per_token"] <= 1  # two nodes


def placement_of(spec, rows):
    return Placement(
        physical_to_logical=rows,
        num_experts=spec.deployment.model.num_experts,
        num_ranks=4,
        ranks_per_node=2,
    )


def test_nothing_crosses_within_one_node_and_all_rows_where_every_rank_is_one():
    result = simulate(spec_of(nodes=1, per_node=4, policies=("none", "ours"), steps=5))
    for row in result["policies"].values():
        assert (row["node_rows_per_token"], row["node_bytes_per_token"]) == (0, 0)
        assert row["rank_bytes_per_token"] > 0
    result = simulate(spec_of(nodes=4, per_node=1, policies=("none",), steps=5))
    row = result["policies"]["none"]
    assert row["rank_bytes_per_token"] == 0
    matrix = np.array(row["node_traffic_NN"])
    assert matrix.sum() == pytest.approx(row["node_bytes_per_token"], rel=1e-4)
    assert (np.diagonal(matrix) == 0).all()


def test_bytes_between_nodes_in_closed_form():
    """Even shares, experts in order: a token misses another node with C(E - E/N, K) / C(E, K)."""
    spec = spec_of(
        nodes=8,
        per_node=8,
        preset="qwen3-235b",
        policies=("none",),
        load=Workload(name="uniform"),
        steps=500,
        tokens_per_rank=1,
        interval=500,
    )
    row = simulate(spec)["policies"]["none"]
    rows = 7 * (1 - math.comb(112, 8) / math.comb(128, 8))
    assert row["node_rows_per_token"] == pytest.approx(rows, rel=0.01)
    hidden = 4096
    row_bytes = hidden + hidden // 128 * 4 + 52 + 2 * hidden  # FP8 and scales, header; sums in BF16
    assert row["node_bytes_per_token"] == pytest.approx(
        row["node_rows_per_token"] * row_bytes, rel=1e-4
    )


# Against known figures --------------------------------------------------------------------------


def test_served_imbalance_is_the_benchmark_s():
    """DeepSeek-V3's experts on 64 ranks x 5 slots, lognormal, jitter 0.1, 65,536 pairs: 1.006 (p99
    1.036) and EPLB 1.141, as `bench balance` has them (docs/balance.md)."""
    spec = spec_of(
        nodes=8, per_node=8, preset="deepseek-v3", steps=40, interval=40, tokens_per_rank=128
    )
    rows = simulate(spec)["policies"]
    assert rows["ours"]["imbalance_mean"] == pytest.approx(1.006, abs=0.003)
    assert rows["ours"]["imbalance_p99"] == pytest.approx(1.036, abs=0.01)
    assert rows["eplb"]["imbalance_mean"] == pytest.approx(1.141, abs=0.01)
    assert rows["eplb"]["planned_imbalance"] == pytest.approx(1.017, abs=0.003)
    assert rows["ours"]["planned_imbalance"] < 1.001
    order = sorted(rows, key=lambda name: rows[name]["throughput"])
    assert order[0] == "none"
    assert order[-1] == "ours"


def test_a_shift_of_tasks_and_what_it_costs():
    spec = spec_of(
        load=Workload(name="task_shift", shift_every=100, jitter=0.05),
        tokens_per_rank=512,
        steps=200,
        eplb_interval=50,
        bandwidth=1e6,
        resplit_s=1e-6,
    )
    rows = simulate(spec)["policies"]
    assert rows["none"]["moves"] == 0
    eplb_row, renamed, ours = (rows[name] for name in ("eplb", "eplb_relabel", "ours"))
    assert [rebalance["step"] for rebalance in eplb_row["rebalances"]] == [49, 99, 149, 199]
    assert eplb_row["moves"] >= renamed["moves"] > ours["moves"] > 0
    expert = spec.deployment.expert_bytes
    for row in rows.values():
        assert row["migrated_bytes"] == row["moves"] * expert
        assert row["moves"] == sum(r["moves"] for r in row["rebalances"])
    # EPLB waits: the last plan's pause comes after the last step and is nobody's
    pauses = sum(r["pause_s"] for r in eplb_row["rebalances"][:-1])
    tokens = 200 * 4 * 512
    lost = tokens / eplb_row["throughput"] - tokens / eplb_row["throughput_bare"]
    assert lost == pytest.approx(pauses, rel=0.02)
    # ours is slower by 2 % while experts come
    assert 0 < ours["throughput_bare"] / ours["throughput"] - 1 < 0.02
    assert ours["rebalances"][0]["step"] >= 100
    # recovered: at the end of the second task as even as at the end of the first
    series = np.array(ours["series"]["balancedness"])
    assert series[-20:].mean() > 0.97 * series[80:100].mean() > series[100:110].mean()


def test_dividing_can_be_charged_for():
    spec = spec_of(policies=("ours", "static"))
    free, charged = simulate(spec)["policies"], simulate(replace(spec, resplit_s=1e-5))["policies"]
    layers = spec.deployment.model.num_moe_layers
    added = charged["ours"]["step_ms_mean"] - free["ours"]["step_ms_mean"]
    assert added == pytest.approx(1e3 * layers * 1e-5, rel=1e-3)
    assert charged["static"] == free["static"]


@pytest.mark.parametrize("sizes", [[30], [20, 10], [4] * 7 + [2], [1] * 30, [28, 1, 1]])
def test_loads_before_and_after_whatever_the_blocks(sizes):
    loads = np.random.default_rng(0).integers(1, 9, (30, 2, 4)).astype(float)
    seconds = np.ones((30, 2))
    parts = LayerTimes(**dict.fromkeys(PARTS, seconds))
    traffic = LayerTraffic(nodes=0, ranks=0, node_rows=1, rank_rows=0, bytes_NN=np.eye(2))
    recorder, ends = Recorder(30, 2, 4, 2), np.cumsum(sizes)
    for end, size in zip(ends, sizes, strict=True):
        some = slice(end - size, end)
        time = seconds[some, 0]
        recorder.add(loads[some], parts, time, time, np.ones(2), np.zeros(2), [traffic] * 2)
    record = recorder.record([])
    for found, part in ((record.before_LR, loads[:3]), (record.after_LR, loads[-3:])):
        total = part.sum(axis=0)
        assert found == pytest.approx(total / total.mean(axis=1, keepdims=True))
    assert record.imbalance_TL == pytest.approx(loads.max(axis=2) / loads.mean(axis=2))
    assert record.node_rows == 1
    assert record.bytes_NN == pytest.approx(np.eye(2))


# The result -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["burst", "drift", "node_skew", "two_topic"])
def test_results_are_whole_and_the_same_again(name):
    spec = spec_of(load=Workload(name=name, shift_every=7), steps=23, tp=2)
    first, second = simulate(spec), simulate(spec)
    assert json.dumps(without_speed(first)) == json.dumps(without_speed(second))
    assert list(first["policies"]) == list(POLICIES)
    model = spec.deployment.model
    load = np.array(first["expert_load_LE"])
    assert load.shape == (model.num_moe_layers, model.num_experts)
    assert load.mean(axis=1) == pytest.approx(np.ones(len(load)), rel=1e-3)
    for row in first["policies"].values():
        assert 1 <= row["imbalance_mean"] <= row["imbalance_p99"]
        assert row["planned_imbalance"] >= 1
        assert row["step_ms_mean"] <= row["step_ms_p99"]
        assert row["series"]["step"] == list(range(23))
        for key in ("balancedness", "planned_balancedness", "throughput"):
            assert len(row["series"][key]) == 23
        parts = row["layer_ms"]
        assert parts["exposed"] + parts["hidden"] == pytest.approx(
            parts["dispatch"] + parts["combine"], rel=1e-3
        )
        for part in row["rank_load_LR"].values():
            assert np.array(part).mean(axis=1) == pytest.approx(np.ones(len(load)), rel=1e-3)
    other = simulate(replace(spec, seed=1))
    assert other["expert_load_LE"] != first["expert_load_LE"]


def test_policies_do_not_depend_on_who_is_beside_them():
    spec = spec_of(load=Workload(name="task_shift", shift_every=15), bandwidth=1e6)
    together = simulate(spec)["policies"]
    for name in POLICIES:
        assert simulate(replace(spec, policies=(name,)))["policies"][name] == together[name]


def test_units_are_independent_and_add_up():
    spec = spec_of(policies=("eplb", "ours"), units=3)
    result = simulate(spec)
    assert without_speed(simulate(spec, num_processes=2)) == without_speed(result)
    from simulations.balance.load_balance import _unit

    records = [_unit(spec, unit)[0].policies["ours"] for unit in range(3)]
    row = result["policies"]["ours"]
    tokens = 30 * spec.tokens
    assert row["throughput"] == pytest.approx(
        sum(tokens / record.steps_s_T.sum() for record in records), rel=1e-5
    )
    everything = np.concatenate([record.imbalance_TL for record in records])
    assert row["imbalance_mean"] == pytest.approx(everything.mean(), rel=1e-5)
    assert 0 <= row["straggler"]["rank"] < 3 * 4
    assert len({record.imbalance_TL.mean() for record in records}) == 3


def test_stopping_keeps_what_is_done():
    spec = spec_of(steps=100)
    asked = []

    def stop():
        asked.append(0)
        return len(asked) > 4

    result = simulate(spec, stop=stop)
    assert result["interrupted"] is True
    assert result["steps"] == 40
    for row in result["policies"].values():
        assert row["series"]["step"] == list(range(40))
        assert np.array(row["rank_load_LR"]["after"]).mean() == pytest.approx(1, rel=1e-4)
    with pytest.raises(KeyboardInterrupt):
        simulate(spec, stop=lambda: True)


def test_prompts_and_low_latency_exchanges():
    spec = spec_of(phase="prefill", policies=("none",), context=32)
    decode = simulate(replace(spec, phase="decode"))["policies"]["none"]
    prefill = simulate(spec)["policies"]["none"]
    assert prefill["layer_ms"]["attention"] != decode["layer_ms"]["attention"]
    deployment = replace(spec.deployment, dispatcher="low_latency", overlap="two_batch")
    row = simulate(replace(spec, deployment=deployment))["policies"]["none"]
    assert row["layer_ms"]["hidden"] > 0


# The command ------------------------------------------------------------------------------------

SMALL = [
    *("--preset", "mosaic", "--nodes", "2", "--ranks-per-node", "2", "--tokens-per-rank", "8"),
    *("--context", "64", "--steps", "20", "--interval", "10"),
]


def command(*more):
    return CliRunner().invoke(app, ["simulate", "balance", *SMALL, *more])


def test_command_prints_a_table_and_writes_json(tmp_path):
    file = tmp_path / "b.json"
    done = command("--json", str(file))
    assert done.exit_code == 0, done.output
    assert max(len(line) for line in done.stdout.splitlines()) <= 80
    for name in POLICIES:
        assert name in done.stdout
    result = json.loads(file.read_text())
    assert (result["kind"], result["steps"]) == ("balance", 20)
    assert set(result["policies"]) == set(POLICIES)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--preset", "deepseek-v9"], "unknown preset 'deepseek-v9': choose from deepseek-v3"),
        (["--workload", "zipff"], "unknown workload 'zipff': choose from"),
        (["--policies", "none,theirs"], "unknown policy 'theirs': choose from none, eplb"),
        (["--policies", "ours,ours"], "policies must be different ones of"),
        (["--redundant-experts", "3"], "% 4 = 3; add 1 redundant experts"),
        (["--redundant-experts", "-4"], "num_redundant_experts must be >= 0"),
        (["--nodes", "0"], "at least one node"),
        (["--tp", "3"], "tensor_parallel_size must divide ranks_per_node"),
        (["--steps", "0"], "steps must be at least 1, got 0"),
        (["--tokens-per-rank", "-1"], "tokens_per_rank must be at least 1, got -1"),
        (["--jitter", "-0.5"], "jitter must be from 0 to 2, got -0.5"),
        (["--rho", "nan"], "rho(nan) must be from 0 to 1"),
        (["--bandwidth", "-1"], "bandwidth(-1e+09) must be > 0"),
        (["--resplit-us", "nan"], "resplit_s(nan)"),
        (["--interval", "0"], "interval must be at least 1"),
        (["--units", "0"], "units must be at least 1"),
        (["--jobs", "0"], "--jobs must be at least 1"),
        (["--seed", "-1"], "seed(-1) >= 0"),
        (["--phase", "both"], "unknown phase 'both'"),
        (["--weights", "int3"], "weights must be one of float8, bfloat16, got 'int3'"),
        (["--dispatcher", "pigeon"], "dispatcher must be one of"),
        (["--calibration", "tpu"], "unknown calibration 'tpu': choose from"),
        (["--trace", "missing.npz"], "missing.npz: No such file or directory"),
        (["--trace", "missing.npz", "--skew", "1"], "--skew is of drawn workloads"),
        (["--json", "/no/such/place.json"], "/no/such/place.json: its directory does not exist"),
        (["--preset", "deepseek-v3", "--nodes", "1"], "on 1 nodes x 2 ranks needs"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(options, message):
    done = command(*options)
    assert done.exit_code == 2, done.output
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1
    assert message in lines[0]
    assert done.stdout == ""


def test_traces_through_the_command(tmp_path):
    model, rng = load_model("mosaic"), np.random.default_rng(0)
    layers, experts, top_k = (
        model.num_moe_layers,
        model.num_experts,
        model.gate.num_experts_per_token,
    )
    keys = rng.random((500, layers, experts)) * np.arange(1, experts + 1)
    ids = np.argsort(keys, axis=2)[:, :, :top_k].astype(np.uint8)
    trace, out = tmp_path / "t.npz", tmp_path / "b.json"
    np.savez(trace, one=ids[:250], two=experts - 1 - ids[250:])
    done = command("--trace", str(trace), "--workload", "task_shift", "--json", str(out))
    assert done.exit_code == 0, done.output
    workload = json.loads(out.read_text())["workload"]
    assert workload == {
        "path": "t.npz",
        "order": "task_shift",
        "shift_every": 500,
        "jitter": 0.0,
        "name": "trace",
    }
    trace.write_bytes(trace.read_bytes()[:-30])
    done = command("--trace", str(trace), "--json", str(tmp_path / "other.json"))
    assert (done.exit_code, (tmp_path / "other.json").exists()) == (2, False)
    assert "t.npz: not a .npz file of plain arrays" in done.stderr


def test_same_command_same_bytes_in_other_processes(tmp_path):
    files = []
    for name in ("a", "b"):
        file = tmp_path / f"{name}.json"
        command = [sys.executable, "-m", "deploy.cli", "simulate", "balance", *SMALL]
        subprocess.run([*command, "--json", str(file)], check=True, capture_output=True)
        files.append(json.loads(file.read_text()))
    assert files[0]["command"][1:] == ["simulate", "balance", *SMALL]
    assert json.dumps(without_speed(files[0])) == json.dumps(without_speed(files[1]))


def test_a_trace_of_one_cluster_size_for_another(tmp_path):
    spec = spec_of()
    ids = np.zeros((9, spec.deployment.model.num_moe_layers + 1, 2), dtype=np.uint8)
    np.savez(tmp_path / "t.npz", one=ids)
    with pytest.raises(ValueError, match="the model has"):
        simulate(replace(spec, load=Trace(path=tmp_path / "t.npz")))
