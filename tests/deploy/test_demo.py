"""`expertmesh demo` as a newcomer runs it, and as one interrupts it."""

import json
import signal
from pathlib import Path

import pytest

from tests.deploy.processes import EXPERTMESH, Traces, running


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
