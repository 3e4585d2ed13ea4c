"""`expertmesh bench codecs`, and what it must find for the defaults to be right."""

import json
from pathlib import Path

import pytest

from experts.gains import MARGIN
from tests.deploy.processes import EXPERTMESH, running

SOURCES = {"normal", "student_t3", "mosaic"}


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> dict:
    report_file = tmp_path_factory.mktemp("bench") / "codecs.json"
    with running([EXPERTMESH, "bench", "codecs", "--json", str(report_file)]) as command:
        assert command.wait(240) == 0, command.output
    return json.loads(report_file.read_text())


def test_every_codec_is_measured_on_every_source(report) -> None:
    expected = SOURCES - {"mosaic"} | {
        "mosaic inputs",
        "mosaic sums of 2 nodes",
        "mosaic sums of 4 nodes",
    }
    for name, row in report["codecs"].items():
        assert set(row["relative_l2"]) == expected
        for errors in row["relative_l2"].values():
            assert 0 <= errors["median"] <= errors["p95"] <= errors["worst"] < 0.1
            assert errors["median"] > 0 or name == "bfloat16"
    assert set(report["speed"]) == set(report["codecs"]) - {"bfloat16"} | {"copy"}


@pytest.mark.parametrize("nodes", ["2", "4"])
@pytest.mark.parametrize("source", sorted(SOURCES))
def test_the_associative_sum_is_no_worse_than_bfloat16(report, source, nodes) -> None:
    """With the default margin: smaller errors, within a hundredth of the bytes, nothing refused."""
    ways = report["sums"][source][nodes]
    ours, bfloat16 = ways[f"fixed, margin {MARGIN:.0f}"], ways["bfloat16"]
    for key in ("median", "p95", "worst"):
        assert 0 < ours["relative_l2"][key] < 0.5 * bfloat16["relative_l2"][key]
    assert ours["bytes_per_element"] < 1.01 * bfloat16["bytes_per_element"]
    assert ours["refused_rows"] == 0


def test_int8_and_int10_earn_their_place(report) -> None:
    codecs = report["codecs"]
    assert codecs["int8"]["bytes_per_element"] < codecs["float8"]["bytes_per_element"]
    assert codecs["int10"]["bytes_per_element"] < codecs["logfmt10"]["bytes_per_element"]
    for source in codecs["int8"]["relative_l2"]:
        for ours, theirs in (("int8", "float8"), ("int10", "logfmt10")):
            ours, theirs = (codecs[name]["relative_l2"][source] for name in (ours, theirs))
            assert ours["median"] < theirs["median"]


def test_a_directory_without_a_model_is_an_error(tmp_path: Path) -> None:
    with running([EXPERTMESH, "bench", "codecs", "--model", str(tmp_path)]) as command:
        assert command.wait(120) == 2, command.output
    assert "config.json" in command.output
    assert "Traceback" not in command.output
