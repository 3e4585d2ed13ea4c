"""Every check of `expertmesh doctor` can fail, alone, and says where and what to do."""

from collections.abc import Callable
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from deploy.doctor.checks import CHECKS, examine
from deploy.doctor.command import summary, table_of
from deploy.doctor.layout import PROCESS_BYTES, nodes_by_host, rank_bytes
from deploy.doctor.situation import Link, Situation
from tests.deploy.doctor.situations import GIB, healthy, with_host

Break = Callable[[Situation], Situation]

HOST_2, HOST_3 = "10.0.0.2", "10.0.0.3"
BREAKS: list[tuple[str, str, str, Break]] = [
    ("hosts", "problem", HOST_3, lambda s: replace(s, silent={HOST_3: "no answer within 60 s"})),
    ("hosts", "warning", "not the Ray head", lambda s: replace(s, driver_is_on_head=False)),
    ("placement", "problem", "free CPUs: 10.0.0.1 4, 10.0.0.2 1, 10.0.0.3 1",
     lambda s: with_host(with_host(s, 1, free_cpus=1), 2, free_cpus=1)),
    ("versions", "problem", "torch: 2.11.0 on 10.0.0.1 and 1 more, 2.10.0 on 10.0.0.2",
     lambda s: with_host(s, 1, versions={**s.hosts[1].versions, "torch": "2.10.0"})),
    ("versions", "problem", "ba9876543210 on 10.0.0.3",
     lambda s: with_host(s, 2, sources="ba9876543210")),
    ("versions", "problem", "not importable on 10.0.0.3", lambda s: with_host(s, 2, sources="")),
    ("model", "problem", "10.0.0.2: No such file or directory",
     lambda s: with_host(s, 1, model={"error": "No such file or directory"})),
    ("model", "problem", "config.json differs: 0123456789ab on 10.0.0.1 and 1 more, ffff on 10.0.0.2",
     lambda s: with_host(s, 1, model={**s.hosts[1].model, "config.json": "ffff"})),
    ("model", "problem", "model.safetensors differs",
     lambda s: with_host(s, 1, model={"config.json": "0123456789ab"})),
    ("memory", "problem", "10.0.0.1: 1.8 GiB needed, 0.5 GiB free",
     lambda s: with_host(s, 0, memory_free=GIB // 2)),
    ("links", "problem", f"{HOST_2} to {HOST_3}: no answer",
     lambda s: replace(s, links=[Link(source=HOST_2, target=HOST_3, seconds=3, error="no answer")])),
    ("clocks", "warning", "10.0.0.2 by -2.00 s",
     lambda s: with_host(s, 1, clock_offset_s=-2.0)),
    ("ports", "problem", "Address already in use",
     lambda s: replace(s, port_errors={"server.port = 50051": "Address already in use"})),
    ("credentials", "problem", "server.token_file",
     lambda s: replace(s, config=healthy("server.host=0.0.0.0").config)),
    ("ray auth", "problem", "run code", lambda s: with_host(s, 1, ray_auth=False)),
    ("stopping", "warning", "kills after 3 s", lambda s: with_host(s, 0, stop_wait_s="")),
    ("shared memory", "problem", "10.0.0.3: Operation not permitted",
     lambda s: with_host(s, 2, memfd_error="Operation not permitted")),
    ("limits", "warning", "1024 on 10.0.0.2", lambda s: with_host(s, 1, open_files=1024)),
    ("processors", "warning", "Other CPU on 10.0.0.2", lambda s: with_host(s, 1, cpu="Other CPU")),
    ("processors", "warning", "Ray counts 4, processes may use 2",
     lambda s: with_host(s, 1, num_cpus=2)),
    ("gpus", "warning", "10.0.0.2: 8 there, torch sees 0",
     lambda s: with_host(s, 1, gpu_devices=8, ray_gpus=8)),
]  # fmt: skip


def test_where_all_is_well_nothing_is_found() -> None:
    findings = examine(healthy())
    assert [(f.check, f.status) for f in findings if f.status != "ok"] == []
    assert len(findings) == len(CHECKS)
    assert summary(findings) == f"{len(CHECKS)} checks are fine, ready to deploy"


@pytest.mark.parametrize(
    ("check", "status", "says", "broken"), BREAKS, ids=[f"{b[0]}: {b[2][:24]}" for b in BREAKS]
)
def test_what_is_broken_is_found_and_nothing_else(
    check: str, status: str, says: str, broken: Break
) -> None:
    findings = {f.check: f for f in examine(broken(healthy())) if f.status != "ok"}
    assert set(findings) == {check}
    assert findings[check].status == status
    assert says in findings[check].message
    assert findings[check].fix


def test_every_check_has_a_break() -> None:
    assert {check for check, *_ in BREAKS} == {f.check for f in examine(healthy())}


def test_a_node_wants_a_host_only_where_it_must() -> None:
    spread, pack = healthy("parallel.num_nodes=4"), healthy("ray.placement_strategy=PACK")
    assert nodes_by_host(spread.config, spread.hosts) is None
    assert nodes_by_host(pack.config, pack.hosts) == {"10.0.0.1": 2}


def test_memory_of_a_rank_counts_weights_once_per_rank_and_cache_as_configured() -> None:
    """mosaic's 11.6 M parameters in two bytes are 22 MiB on one rank."""
    one = healthy("parallel.num_nodes=1", "parallel.ranks_per_node=1", "cache.memory_gib=1").config
    four = healthy("cache.memory_gib=1").config
    assert 22 << 20 < rank_bytes(one) - GIB - PROCESS_BYTES < 48 << 20
    assert rank_bytes(four) < rank_bytes(one)
    assert rank_bytes(healthy("cache.memory_gib=3").config) - rank_bytes(four) == 2 * GIB


def test_a_layout_that_cannot_be_is_a_problem_of_its_own() -> None:
    situation = healthy("parallel.num_nodes=3")
    findings = {f.check: f for f in examine(situation) if f.status != "ok"}
    assert "add 4 redundant experts" in findings["memory"].message


def test_tokens_and_certificates_are_read_as_the_server_will(tmp_path: Path) -> None:
    (tmp_path / "tokens").write_text("")
    (tmp_path / "tokens").chmod(0o600)
    situation = healthy(f"server.token_file={tmp_path / 'tokens'}")
    findings = {f.check: f for f in examine(situation) if f.status != "ok"}
    assert "holds no token" in findings["credentials"].message


def test_nobody_answered() -> None:
    findings = examine(replace(healthy(), hosts=[], silent={"10.0.0.1": "no answer"}))
    assert [f.status for f in findings] == ["problem"]


def test_brackets_in_messages_are_shown_as_they_are() -> None:
    situation = replace(healthy(), port_errors={"server.port = 1 on [::1]": "Permission denied"})
    console = Console(width=80, record=True, file=StringIO())
    console.print(table_of(examine(situation)))
    shown = console.export_text()
    assert "on [::1]" in shown
    assert max(map(len, shown.splitlines())) <= 80
