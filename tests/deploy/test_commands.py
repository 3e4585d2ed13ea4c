"""`verify` and `bench` as their users call them: exit code, table, JSON."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.deploy.processes import EXPERTMESH, running


def test_verify_compares_a_directory_without_tokenizer(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    report_file = tmp_path / "verify.json"
    directory = tiny_checkpoint("qwen3_moe_norm")
    assert not (directory / "tokenizer.json").exists()
    arguments = ["--layouts", "1x1,1x2", "--tokens", "8", "--json", str(report_file)]
    with running([EXPERTMESH, "verify", str(directory), *arguments]) as command:
        assert command.wait(240) == 0, command.output
    results = json.loads(report_file.read_text())["results"]
    assert list(results) == ["1x1", "1x2"]
    for row in results.values():
        assert row["tokens_equal"]
        assert 0 <= row["max_abs_logit_diff"] <= 1e-4


def test_verify_refuses_what_it_cannot_do(tmp_path: Path) -> None:
    with running([EXPERTMESH, "verify", str(tmp_path)]) as command:
        assert command.wait(60) == 2
    assert "config.json" in command.output
    assert "Traceback" not in command.output


def test_bench_collectives_reports_both_sides(tmp_path: Path) -> None:
    report_file = tmp_path / "collectives.json"
    arguments = ["bench", "collectives", "--ranks", "2", "--json", str(report_file)]
    with running([EXPERTMESH, *arguments]) as command:
        assert command.wait(240) == 0, command.output
    results = json.loads(report_file.read_text())["results"]
    assert {"all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast"} <= set(results)
    rows = [row for sizes in results.values() for row in sizes.values()]
    assert all(row["shm_us"] > 0 and row["gloo_us"] > 0 for row in rows)


def test_bench_step_says_where_the_time_goes(tmp_path: Path) -> None:
    report_file = tmp_path / "step.json"
    arguments = ["bench", "step", "--sequences", "2", "--steps", "3", "--json", str(report_file)]
    with running([EXPERTMESH, *arguments, "parallel.num_nodes=1"]) as command:
        assert command.wait(240) == 0, command.output
    report = json.loads(report_file.read_text())
    phases = {
        "schedule",
        "broadcast",
        "attention",
        "gate",
        "dispatch",
        "experts",
        "combine",
        "sample",
    }
    assert phases <= set(report["results"])
    total = sum(row["ms"] for row in report["results"].values())
    assert abs(total - report["step_ms"]) < 1e-6 * report["step_ms"]


def test_bench_step_writes_a_trace_of_all_ranks(tmp_path: Path) -> None:
    trace_file, report_file = tmp_path / "trace.json", tmp_path / "step.json"
    files = ["--trace", str(trace_file), "--json", str(report_file)]
    layout = ["parallel.num_nodes=2", "parallel.ranks_per_node=1"]
    arguments = ["bench", "step", "--sequences", "2", "--steps", "3", *files, *layout]
    with running([EXPERTMESH, *arguments]) as command:
        assert command.wait(240) == 0, command.output
    assert str(trace_file) in command.output
    report, events = json.loads(report_file.read_text()), load_events(trace_file)
    names = {event["pid"]: event["args"]["name"] for event in events["process_name"]}
    assert sorted(names.values()) == ["rank 0 (node 0)", "rank 1 (node 1)"]
    leader = next(pid for pid, name in names.items() if name == "rank 0 (node 0)")
    assert {event["pid"] for event in events["step 2"]} == set(names)
    for phase, row in report["results"].items():  # the two accounts agree, span by span
        if phase != "other":
            spans = [event["dur"] for event in events[phase] if event["pid"] == leader]
            assert abs(sum(spans) / 1000 - 3 * row["ms"]) < 1e-3 * len(spans) + 1e-6
    assert [row["rank"] for row in report["overlap"]] == [0, 1]


def load_events(trace_file: Path) -> dict[str, list[dict[str, Any]]]:
    """The events of a trace file by name."""
    events: dict[str, list[dict[str, Any]]] = {}
    for event in json.loads(trace_file.read_text())["traceEvents"]:
        events.setdefault(event["name"], []).append(event)
    return events


def test_bench_step_refuses_a_trace_file_that_cannot_be(tmp_path: Path) -> None:
    where = str(tmp_path / "missing" / "trace.json")
    with running([EXPERTMESH, "bench", "step", "--trace", where]) as command:
        assert command.wait(60) == 2
    assert "cannot write a trace" in command.output
    assert "Traceback" not in command.output
