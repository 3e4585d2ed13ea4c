"""`expertmesh simulate sweep`: same bytes however it ran, what does not fit, what is refused."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from comms.topology import Topology
from deploy.cli import app
from simulations.balance.load_balance import BalanceSpec, simulate
from simulations.balance.load_shares import Workload
from simulations.deployment import Deployment
from simulations.hardware.calibration import Calibration
from simulations.memory import rank_memory
from simulations.presets import load_model
from simulations.sweep.point import Study, evaluate
from simulations.sweep.sweep import Point, best_points

GRID = (
    "--preset=mosaic",
    "--nodes=1,2",
    "--ranks-per-node=2",
    "--redundant-experts=0,4",
    "--tokens-per-rank=8",
    "--policies=none,ours",
    "--steps=4",
)
H100 = Calibration.named("h100-published")
POINT = Point(
    num_nodes=2,
    ranks_per_node=2,
    num_redundant_experts=4,
    tokens_per_rank=8,
    context=512,
    overlap="none",
    policy="ours",
)
STUDY = Study(preset="mosaic", calibration=H100, workload=Workload(), steps=4)


def run(*arguments):
    result = CliRunner().invoke(app, ["simulate", "sweep", *arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_the_same_bytes_whatever_the_processes_and_the_interruptions(tmp_path) -> None:
    first, second, points = (tmp_path / name for name in ("1.json", "2.json", "points"))
    assert run(*GRID, "--jobs=1", "--json", str(first)).exit_code == 0
    part = [option for option in GRID if "nodes" not in option] + ["--ranks-per-node=2"]
    assert run(*part, "--nodes=2", "--jobs=1", "--points", str(points)).exit_code == 0
    points.write_bytes(points.read_bytes()[:-20])
    done = run(*GRID, "--jobs=2", "--points", str(points), "--json", str(second))
    assert done.exit_code == 0
    assert first.read_bytes() == second.read_bytes()
    assert len(points.read_text().splitlines()) == 1 + 8


def test_a_point_is_a_run_of_simulate_balance() -> None:
    found = evaluate(STUDY, POINT)
    deployment = Deployment(
        model=load_model("mosaic"),
        topology=Topology(num_nodes=2, ranks_per_node=2, tensor_parallel_size=1),
        num_redundant_experts=4,
    )
    spec = BalanceSpec(
        model_name="mosaic",
        deployment=deployment,
        calibration=H100,
        load=Workload(),
        policies=("none", "ours"),
        steps=4,
        tokens_per_rank=8,
        context=512,
    )
    ours = simulate(spec)["policies"]["ours"]
    memory = rank_memory(deployment, H100, max_tokens=8, kv_tokens=8 * 512)
    assert found["status"] == "ok"
    assert found["throughput"] == ours["throughput"] == 4 * found["tokens_per_s_per_rank"]
    assert found["tpot_ms"] == ours["step_ms_mean"]
    assert found["node_bytes_per_token"] == ours["node_bytes_per_token"]
    assert (found["memory_bytes"], found["free_bytes"]) == (memory.total, memory.free)


def test_what_does_not_fit_says_by_how_much() -> None:
    small = replace(STUDY, calibration=replace(H100, memory_bytes=1e7))
    found = evaluate(small, POINT)
    needs = evaluate(STUDY, POINT)["memory_bytes"]
    assert found["status"] == "does not fit"
    assert found["missing_bytes"] == needs - 1e7
    assert "too much" in found["why"]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"num_redundant_experts": 3}, r"\(32 \+ 3\) % 4 = 3"),
        ({"policy": "best"}, "unknown policy 'best'"),
        ({"overlap": "three"}, "overlap must be one of none, two_batch"),
    ],
)
def test_points_that_cannot_be_say_why(change, why: str) -> None:
    found = evaluate(STUDY, replace(POINT, **change))
    assert found["status"] == "impossible"
    assert re.search(why, found["why"])


def test_the_key_of_a_point_changes_with_all_that_matters() -> None:
    about = STUDY.about()
    for change in (
        {"preset": "mixtral-8x7b"},
        {"calibration": replace(H100, hash="0")},
        {"workload": Workload(jitter=0.2)},
        {"weights": "bfloat16"},
        {"steps": 5},
        {"seed": 1},
    ):
        assert replace(STUDY, **change).about() != about
    assert {"version", "code"} <= set(about)


def test_the_table_fits_a_terminal_and_names_the_best(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    file = tmp_path / "r.json"
    done = run(*GRID, "--redundant-experts=0,3,4", "--jobs=1", "--json", str(file))
    assert max(map(len, done.stdout.splitlines()[:10])) <= 80
    result = json.loads(file.read_text())
    assert result["kind"] == "sweep"
    assert [entry["point"]["policy"] for entry in result["points"][:2]] == ["none", "ours"]
    statuses = [entry["result"]["status"] for entry in result["points"]]
    assert statuses.count("impossible") == 4
    best = result["points"][result["best"]["throughput"]]["result"]["throughput"]
    assert best == max(e["result"].get("throughput", 0) for e in result["points"])
    assert f"most tokens/s at all: {best:,.0f}" in done.stdout
    assert "impossible: every rank needs the same number of slots" in done.stdout


def test_the_best_within_a_time_per_token() -> None:
    def ok(rate: float, per_rank: float, tpot_ms: float) -> dict[str, object]:
        figures = {"throughput": rate, "tokens_per_s_per_rank": per_rank, "tpot_ms": tpot_ms}
        return {"status": "ok", **figures}

    results = [{"status": "impossible"}, ok(90, 3, 60), ok(80, 4, 51), ok(70, 2, 50), ok(70, 1, 9)]
    assert best_points(results, 50) == {
        "throughput": 1,
        "tokens_per_s_per_rank": 2,
        "throughput_within_tpot": 3,
        "tokens_per_s_per_rank_within_tpot": 3,
    }
    assert set(best_points(results, 1).values()) == {1, 2, None}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--nodes=4,x"], "--nodes must be whole numbers such as 4,8, got '4,x'"),
        (["--nodes="], "--nodes must be whole numbers"),
        (["--nodes=0"], "num_nodes must be at least 1, got 0"),
        (["--tokens-per-rank=8,8"], "tokens_per_rank needs values that differ"),
        (["--redundant-experts=-4"], "num_redundant_experts must be at least 0, got -4"),
        (["--redundant-experts=3"], "(32 + 3) % "),
        (["--policies=best"], "unknown policy 'best'"),
        (["--policies="], "unknown policy ''"),
        (["--workload=heavy"], "unknown workload 'heavy'"),
        (["--jitter=-1"], "jitter must be from 0"),
        (["--jitter=nan"], "jitter must be from 0"),
        (["--overlap=three"], "overlap must be one of"),
        (["--weights=int3"], "weights must be one of"),
        (["--steps=0"], "steps must be at least 1"),
        (["--seed=-1"], "seed(-1) >= 0"),
        (["--jobs=0"], "--jobs must be at least 1"),
        (["--tpot-ms=nan"], "--tpot-ms positive"),
        (["--preset=gpt"], "unknown preset 'gpt'"),
        (["--calibration=a100"], "unknown calibration 'a100'"),
        (["--points=README.md"], "README.md: not a file of sweep points"),
        (["--json=/nowhere/x.json"], "/nowhere/x.json: its directory does not exist"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(tmp_path, arguments, words: str) -> None:
    before = Path("README.md").read_bytes()
    file = tmp_path / "out.json"
    result = run(*GRID, "--jobs=1", "--json", str(file), *arguments)
    assert result.exit_code == 2
    assert words in result.stderr
    assert result.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())
    assert Path("README.md").read_bytes() == before


def test_ctrl_c_keeps_what_is_done_and_says_how_to_go_on(tmp_path) -> None:
    many = ",".join(str(number) for number in range(1, 400))
    command = [sys.executable, "-m", "deploy.cli", "simulate", "sweep", *GRID]
    command += [f"--tokens-per-rank={many}", "--jobs=2", "--json=out.json"]
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    running = subprocess.Popen(
        [*command, "--points=points"],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    points = tmp_path / "points"
    try:
        while not points.exists() or points.read_text().count("\n") < 4:
            assert running.poll() is None
            time.sleep(0.05)
        running.send_signal(signal.SIGINT)
        _, told = running.communicate(timeout=60)
    finally:
        running.kill()
        running.communicate()
    assert running.returncode == 130, told
    assert "to go on: the same command with --points points" in told
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["interrupted"] is True
    assert 3 <= len(result["points"]) == points.read_text().count("\n") - 1
