"""What the benchmark measures, against a count of its own tokens' destinations, one by one."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from comms.topology import Topology
from simulations.bench import bench_dispatch
from simulations.bench.moe_layer import Problem, Workload

WORKLOAD = Workload(
    hosts=0, ranks_per_host=2, hidden=512, experts=32, topk=4, groups=4, topk_groups=2, tokens=30
)


@pytest.fixture(scope="module")
def trace_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("dispatch") / "trace.json"


@pytest.fixture(scope="module")
def report(trace_file: Path) -> dict[str, Any]:
    return bench_dispatch.run(WORKLOAD, repeats=1, trace_file=trace_file)


def crossings() -> tuple[int, int]:
    """How many (token, expert) and how many (token, node) are on another node than the token."""
    topology = WORKLOAD.topology
    experts_per_node = WORKLOAD.experts // topology.num_nodes
    pairs = copies = 0
    for rank in range(topology.world_size):
        for ids in Problem.of_rank(WORKLOAD, rank).ids_TK.tolist():
            away = [e // experts_per_node for e in ids]
            away = [node for node in away if node != topology.node_of(rank)]
            pairs += len(away)
            copies += len(set(away))
    return pairs, copies


def test_bytes_are_those_of_the_rows_that_must_cross(report: dict[str, Any]) -> None:
    pairs, copies = crossings()
    assert 0 < copies < pairs
    rows = {  # bytes per channel: there and back
        "flat_bf16": (2 + 2) * WORKLOAD.hidden * pairs,
        "flat_fp8": (1 + 2) * WORKLOAD.hidden * pairs,
        "hier_fp8": (1 + 2) * WORKLOAD.hidden * copies,
        "hier_fp8_logfmt": (1 + 10 / 8) * WORKLOAD.hidden * copies,
        "hier_int8_int8": (1 + 1) * WORKLOAD.hidden * copies,
        "hier_fp8_fixed": (1 + 2) * WORKLOAD.hidden * copies,
    }
    assert set(rows) == set(report["schemes"])
    for name, num_bytes in rows.items():
        # Scales, slots, weights and counts come on top.
        assert num_bytes < report["schemes"][name]["ledger_bytes"] < 1.2 * num_bytes, name


def test_every_scheme_returns_the_sum_of_the_experts(report: dict[str, Any]) -> None:
    """Within what rounding to so many bits does to a sum; never zeros, whose error is 1."""
    errors = {name: row["rel_l2"] for name, row in report["schemes"].items()}
    assert 0 < errors["flat_bf16"] < 2**-8
    for name in set(errors) - {"flat_bf16"}:
        assert 2**-8 < errors[name] < 2**-5, name
    assert errors["hier_fp8_logfmt"] - errors["hier_fp8"] <= 0.004


def test_the_trace_shows_every_scheme_on_every_rank(
    report: dict[str, Any], trace_file: Path
) -> None:
    events = json.loads(trace_file.read_text())["traceEvents"]
    spans = {(event["pid"], event["name"]) for event in events if event["ph"] == "X"}
    assert len({pid for pid, _ in spans}) == WORKLOAD.topology.world_size
    for pid, name in itertools.product({pid for pid, _ in spans}, report["schemes"]):
        assert (pid, name) in spans


def test_ratios_are_to_what_others_send(report: dict[str, Any]) -> None:
    base = report["schemes"]["flat_bf16"]
    for row in report["schemes"].values():
        assert row["bytes_ratio"] == row["ledger_bytes"] / base["ledger_bytes"]
        assert row["seconds_ratio"] == row["seconds_median"] / base["seconds_median"]


def test_tokens_of_a_group_limited_gate_stay_in_their_groups() -> None:
    size = WORKLOAD.experts // WORKLOAD.groups
    for ids in Problem.of_rank(WORKLOAD, 0).ids_TK.tolist():
        assert len(set(ids)) == WORKLOAD.topk
        assert len({e // size for e in ids}) <= WORKLOAD.topk_groups


def test_no_hosts_means_two_nodes() -> None:
    assert WORKLOAD.topology == Topology(num_nodes=2, ranks_per_node=2)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"hosts": 1}, "hosts must be 0 or at least 2"),
        ({"experts": 255}, r"experts\(255\) % ranks\(8\) = 7"),
        ({"tokens": 0}, "tokens must be at least 1"),
        ({"topk": 300}, r"num_experts_per_token\(300\)"),
        ({"groups": 7}, r"num_groups\(7\)"),
        ({"rate": "fast"}, "'fast'"),
    ],
)
def test_workloads_that_cannot_be(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Workload(**options)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"schemes": ["flat_bf16", "best"]}, "no scheme 'best'; there are flat_bf16"),
        ({"schemes": []}, "need a scheme"),
        ({"repeats": 0}, "a repeat"),
        ({"inter_node_backend": "udp"}, "'udp'"),
    ],
)
def test_runs_that_cannot_be(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        bench_dispatch.run(WORKLOAD, **options)
