"""`expertmesh bench balance` as a command: its table, its JSON, its refusals."""

import json

from tests.deploy.processes import EXPERTMESH, running


def test_a_section_as_table_and_json(tmp_path) -> None:
    report_file = tmp_path / "balance.json"
    arguments = ["--section", "drift", "--section", "served", "--json", str(report_file)]
    with running([EXPERTMESH, "bench", "balance", *arguments]) as command:
        assert command.wait(120) == 0, command.output
    report = json.loads(report_file.read_text())
    assert set(report) == {"drift", "served"}
    assert set(report["drift"]) == {"0.999", "0.99", "0.95"}
    assert {"bytes_ratio", "imbalance"} <= set(report["drift"]["0.99"])
    assert set(report["served"]) == {"0.0", "0.1", "0.2", "0.3", "0.5"}
    assert {"mean", "p99", "eplb_mean", "eplb_p99"} <= set(report["served"]["0.1"])
    assert f"{report['served']['0.5']['mean']:.3f}" in command.output


def test_a_missing_trace_is_explained() -> None:
    with running([EXPERTMESH, "bench", "balance", "--section", "real"]) as command:
        assert command.wait(60) == 2, command.output
    assert "add --trace" in command.output
    assert "Traceback" not in command.output
