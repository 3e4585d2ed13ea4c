"""`expertmesh testbed` and `expertmesh bench dispatch` as their users call them."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from simulations.testbed import Testbed
from tests.deploy.processes import EXPERTMESH, running

IMPOSSIBLE = Testbed.available()
needs_hosts = pytest.mark.skipif(IMPOSSIBLE is not None, reason=IMPOSSIBLE or "")
NAME = f"test-{os.getpid()}"  # leaves alone what somebody has made by hand
SMALL = "--hidden 256 --experts 16 --topk 4 --groups 4 --topk-groups 2 --tokens 40 --repeats 2"


def run(*arguments: str, timeout_s: float = 60) -> tuple[int, str]:
    with running([EXPERTMESH, *arguments]) as command:
        return command.wait(timeout_s), command.output


@pytest.fixture
def up() -> Iterator[str]:
    """What `testbed up` prints; two hosts are up."""
    code, output = run("testbed", "up", "--hosts", "2", "--rate", "100mbit", "--name", NAME)
    try:
        assert code == 0, output
        yield output
    finally:
        run("testbed", "down", "--name", NAME)


@needs_hosts
def test_up_says_what_there_is_and_how_to_use_it(up: str) -> None:
    assert "2 hosts, 10.77.0.1 .. 10.77.0.2, links of 100mbit each way" in up
    assert f"expertmesh testbed exec --name {NAME} 0 -- " in up
    assert f"expertmesh testbed down --name {NAME}" in up


@needs_hosts
def test_exec_passes_on_the_exit_code(up: str) -> None:
    inside = ("testbed", "exec", "--name", NAME, "1", "--")
    code, output = run(*inside, "sh", "-c", "ip -br addr show e0; exit 7")
    assert (code, output.split()[-1]) == (7, "10.77.0.2/24")
    assert run(*inside, "nonesuch") == (127, "nonesuch: command not found")
    code, output = run("testbed", "exec", "--name", NAME, "2", "--", "true")
    assert code == 125
    assert "has no host 2" in output


@needs_hosts
def test_status_shows_the_hosts(up: str) -> None:
    code, output = run("testbed", "status")
    assert code == 0
    rows = [line.split("│") for line in output.splitlines() if NAME in line]
    assert [[cell.strip() for cell in row[2:5]] for row in rows] == [
        ["0", "10.77.0.1", "100 Mbit/s"],
        ["1", "10.77.0.2", "100 Mbit/s"],
    ]
    assert max(map(len, output.splitlines())) <= 80


@needs_hosts
def test_up_twice_is_refused(up: str) -> None:
    code, output = run("testbed", "up", "--name", NAME)
    assert code == 1
    assert f"`expertmesh testbed down --name {NAME}` removes it" in output


@needs_hosts
def test_down_removes_it(up: str) -> None:
    assert any(NAME in entry for entry in os.listdir("/run/netns"))
    code, output = run("testbed", "down", "--name", NAME)
    assert (code, NAME in output) == (0, True)
    assert not any(NAME in entry for entry in os.listdir("/run/netns"))
    code, output = run("testbed", "down", "--name", NAME)
    assert (code, f"no testbed named {NAME}" in output) == (0, True)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--hosts", "0"], "1 to 200 hosts"),
        (["--rate", "100mbps"], "'100mbps'"),
        (["--name", "Mine!"], "'Mine!'"),
    ],
)
def test_up_refuses_what_cannot_be(arguments: list[str], says: str) -> None:
    code, output = run("testbed", "up", *arguments)
    assert code == 2
    assert says in output
    assert "Traceback" not in output


@needs_hosts
def test_bench_dispatch_counts_bytes_on_the_links(tmp_path: Path) -> None:
    report = bench_dispatch(tmp_path, "--hosts", "2", "--ranks-per-host", "2")
    assert report["config"]["hosts"] == 2
    for row in report["schemes"].values():
        # What the ledger says was sent has crossed, and headers are all that came on top.
        assert row["ledger_bytes"] < row["wire_bytes"] <= 1.2 * row["ledger_bytes"] + 50_000
    assert_sound(report)


def test_bench_dispatch_without_hosts(tmp_path: Path) -> None:
    report = bench_dispatch(tmp_path, "--hosts", "0", "--ranks-per-host", "1")
    assert all(row["wire_bytes"] is None for row in report["schemes"].values())
    assert_sound(report)


def bench_dispatch(tmp_path: Path, *arguments: str) -> dict:
    report_file = tmp_path / "dispatch.json"
    options = [*SMALL.split(), *arguments, "--json", str(report_file)]
    code, output = run("bench", "dispatch", *options, timeout_s=240)
    assert code == 0, output
    report = json.loads(report_file.read_text())
    assert all(name in output for name in report["schemes"])
    return report


def assert_sound(report: dict) -> None:
    schemes = report["schemes"]
    assert {"flat_bf16", "flat_fp8", "hier_fp8"} <= set(schemes)
    for row in schemes.values():
        assert 0 < row["seconds_median"] <= row["seconds_p95"]
        assert len(row["seconds"]) == report["config"]["repeats"]
    # BF16 keeps 8 bits, e4m3 keeps 4: the relative error of a sum of rounded numbers is below these.
    assert 0 < schemes["flat_bf16"]["rel_l2"] < 2**-8
    assert 2**-8 < schemes["flat_fp8"]["rel_l2"] < 2**-4
    assert 2**-8 < schemes["hier_fp8"]["rel_l2"] < 2**-4
    # A token goes to a node once, not once for each of its experts there, in one byte, not two.
    ledger = {name: row["ledger_bytes"] for name, row in schemes.items()}
    assert ledger["hier_fp8"] < ledger["flat_fp8"] < ledger["flat_bf16"]


def test_bench_dispatch_refuses_what_cannot_be() -> None:
    code, output = run("bench", "dispatch", "--experts", "255")
    assert code == 2
    assert "experts must be a multiple of the ranks" in output
    assert "Traceback" not in output
