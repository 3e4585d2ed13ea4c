"""`expertmesh bench serve` as a command: on a running server, its tables, its refusals."""

import io
import json
from array import array

from rich.console import Console

from deploy.bench.serve import Findings, ServeBench, report_of, show
from simulations.bench.load_process import Sent
from simulations.bench.serving_load import Load
from simulations.bench.serving_outcomes import Outcome, Slo
from simulations.serving.arrivals import Lengths
from tests.deploy.processes import EXPERTMESH, running


def outcome(num_tokens: int = 5) -> Outcome:
    chunks = array("d", [1234.5 + 0.1 * idx for idx in range(num_tokens)])
    return Outcome(0, 0.0, chunk_s=chunks, num_tokens=num_tokens, end_s=chunks[-1], num_ends=1)


def test_medians_and_ratios_are_of_rounds() -> None:
    load = Load(num_requests=2, concurrency=2, prompt=Lengths(mean=4), output=Lengths(mean=5))
    found = Findings(
        loads=[Sent([outcome()], 1.0, 0.1)] * 3,
        one_at_a_time=[10.0, 20.0, 30.0],
        many=[100.0, 100.0, 600.0],
        transformers={1: [100.0, 200.0], 16: [1000.0, 1000.0]},
        ours={1: [110.0, 240.0], 16: [1500.0, 2500.0]},
        threads={1: 1, 16: 2},
        layout="2x2",
        server_cpu_s={"controller": 0.3, "ranks": 2.0},
    )
    report = report_of(ServeBench(load, Slo(ttft_ms=1.0)), found)
    assert report["throughput_tokens_per_s"] == 100
    assert report["one_at_a_time_tokens_per_s"] == 20
    assert report["continuous_batching_ratio"] == 10
    assert report["transformers"]["batch_1"] == 150
    assert report["transformers"]["ratio"] == {"batch_1": 1.15, "batch_16": 2.0}
    assert report["controller_ms_per_token"] == 1e3 * 0.3 / 15
    assert report["goodput"]["share"] == 0
    json.dumps(report)
    shown = Console(width=80, file=io.StringIO())
    show(shown, report)
    assert max(map(len, shown.file.getvalue().splitlines())) <= 80
    assert "2.00x" in shown.file.getvalue()


def test_a_load_on_a_running_server(endpoint, tmp_path) -> None:
    report_file = tmp_path / "serve.json"
    arguments = ["--endpoint", endpoint, "--concurrency", "6", "--requests", "9", "--rounds", "1"]
    arguments += ["--prompt", "10:0.5", "--output", "6", "--json", str(report_file)]
    with running([EXPERTMESH, "bench", "serve", *arguments, "--slo-ttft-ms", "60000"]) as command:
        assert command.wait(120) == 0, command.output
    report = json.loads(report_file.read_text())
    assert report["requests"] == {"ok": 9, "rejected": 0, "failed": 0}
    assert report["completion_tokens"] == 54
    assert report["goodput"]["share"] == 1
    assert report["one_at_a_time_tokens_per_s"] > 0
    assert report["transformers"]["batch_1"] is None
    assert "--endpoint" in report["transformers"]["reason"]
    for key in ("ttft_ms", "tpot_ms", "itl_ms", "e2e_ms"):
        assert report[key]["p50"] <= report[key]["p95"] <= report[key]["p99"]
    assert max(map(len, command.output.splitlines())) <= 80


def test_what_cannot_be_is_refused_at_once() -> None:
    for arguments in (["--prompt", "x"], ["--prefixes", "2"], ["--endpoint", "127.0.0.1:1"]):
        with running([EXPERTMESH, "bench", "serve", *arguments]) as command:
            assert command.wait(60) in (1, 2), command.output
        assert "Traceback" not in command.output
