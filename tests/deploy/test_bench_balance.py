"""`expertmesh bench balance` as a command: its tables, its JSON, its refusals."""

import json

from deploy.bench.balance import balance_command
from simulations.bench import bench_balance
from simulations.workload import SHAPES, WORKLOADS
from tests.deploy.processes import EXPERTMESH, running

CELL = {"ours": 1.001, "eplb": 2.345, "difference": 0.0012, "worst_difference": 0.004}
SERVED = {"mean": 1.002, "p99": 1.03, "eplb_mean": 1.067, "eplb_p99": 1.104}
SHIFT = {
    "mean": None, "p99": None, "eplb_mean": 1.8, "batches": None, "above": 0.5, "moves": 5.5,
    "moves_per_batch": 64, "unmoved_mean": 1.637,
}  # fmt: skip
REPORT = {
    "planned": {shape: dict.fromkeys(WORKLOADS, CELL) for shape in SHAPES},
    "seconds": {"plan": 0.0283, "split": 0.00049},
    "served": {"0.1": SERVED | {"eplb_split_mean": 1.09, "eplb_split_p99": 1.186}},
    "real": {"same_task": SERVED, "shift_in_order": SHIFT},
    "drift": {
        "0.99": {"moves": 1.79, "eplb_moves": 310.2, "bytes_ratio": 0.0058, "imbalance": 1.022,
                 "p99": 1.055}
    },
    "sends": {"per_token": 1.526, "naive": 4.5, "imbalance": 1.036},
    "skipped": ["real"],
}  # fmt: skip


def test_every_section_is_shown_within_80_columns(monkeypatch, capsys, tmp_path) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(bench_balance, "run", lambda *arguments: REPORT)
    assert balance_command([], None, tmp_path / "report.json") == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines()[:-2])) <= 80
    for figure in (
        "2.345", "0.12", "1.104", "1.186", "1.637", "310", "0.0058x", "1.526", "0.339x", "28 ms",
        "0.49 ms", "left out: real",
    ):  # fmt: skip
        assert figure in shown
    assert json.loads((tmp_path / "report.json").read_text()) == REPORT


def test_a_section_as_table_and_json(tmp_path) -> None:
    report_file = tmp_path / "balance.json"
    arguments = ["--section", "served", "--json", str(report_file)]
    with running([EXPERTMESH, "bench", "balance", *arguments]) as command:
        assert command.wait(120) == 0, command.output
    report = json.loads(report_file.read_text())
    assert set(report) == {"served"}
    assert set(report["served"]) == {"0.0", "0.1", "0.2", "0.3", "0.5"}
    assert set(SERVED) <= set(report["served"]["0.1"])
    assert f"{report['served']['0.5']['mean']:.3f}" in command.output


def test_a_missing_trace_is_explained() -> None:
    with running([EXPERTMESH, "bench", "balance", "--section", "real"]) as command:
        assert command.wait(60) == 2, command.output
    assert "add --trace" in command.output
    assert "Traceback" not in command.output
