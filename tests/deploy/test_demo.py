"""`expertmesh demo` as a newcomer runs it, and as one interrupts it."""

import json
import re
import signal
from pathlib import Path

import pytest

from tests.deploy.processes import EXPERTMESH, Traces, running, workers_below


def test_demo_shows_text_load_and_traffic_and_leaves_nothing(tmp_path: Path) -> None:
    before = Traces.now()
    report_file = tmp_path / "demo.json"
    with running([EXPERTMESH, "demo", "--json", str(report_file)]) as command:
        assert command.wait(240) == 0, command.output
    assert Traces.now().left_since(before) == {}
    assert max(len(line) for line in command.lines) <= 80

    report = json.loads(report_file.read_text())
    assert {prompt["domain"] for prompt in report["prompts"]} >= {"english", "chinese", "python"}
    for prompt in report["prompts"]:
        assert prompt["text"].strip()
        assert prompt["tokens"]
    assert report["tokens_per_s"] > 0
    assert report["bytes"]["intra_node"] > 0
    assert report["bytes"]["inter_node"] > 0
    loads = report["expert_load"]
    assert len(loads) == 4
    assert len({len(layers) for layers in loads}) == 1
    # Every token visits top-4 experts in every MoE layer, so all layers saw the same total.
    assert len({sum(column) for column in zip(*loads, strict=True)}) == 1


@pytest.mark.parametrize("moment", ["starting 2 logical nodes", "ready after"])
def test_interrupted_demo_leaves_nothing(moment: str) -> None:
    before = Traces.now()
    with running([EXPERTMESH, "demo"]) as command:
        command.wait_for(moment, 120)
        command.signal(signal.SIGINT)
        assert command.wait(60) == 130, command.output
    assert Traces.now().left_since(before) == {}


def test_a_rank_that_dies_is_named_at_once() -> None:
    """Nobody waits for the cluster's end here; silence alone would be told after a minute."""
    before = Traces.now()
    with running([EXPERTMESH, "demo"]) as command:
        command.wait_for("ready after", 120)
        workers_below(command.process.pid)[1].kill()
        assert command.wait(50) == 1, command.output
    assert re.search(r"rank \d ended", command.output.replace("\n", " "))
    assert Traces.now().left_since(before) == {}
