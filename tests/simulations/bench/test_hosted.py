"""Ranks on hosts: where they are, what crosses the links, and that a cut link ends nothing for good."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from comms.groups import CommError, ParallelGroups
from comms.topology import Topology
from simulations.bench.hosted import HostedRanks
from simulations.testbed import Testbed

IMPOSSIBLE = Testbed.available()
pytestmark = pytest.mark.skipif(IMPOSSIBLE is not None, reason=IMPOSSIBLE or "")

HOSTS, RANKS_PER_HOST = 2, 2
TOPOLOGY = Topology(num_nodes=HOSTS, ranks_per_node=RANKS_PER_HOST)
ROW_BYTES = 200_000
COMM_TIMEOUT_S = 3.0


@pytest.fixture(scope="module")
def testbed() -> Iterator[Testbed]:
    with Testbed(HOSTS, "200mbit") as made:
        yield made


@pytest.fixture(scope="module")
def ranks(testbed: Testbed) -> Iterator[HostedRanks]:
    with HostedRanks(testbed, RANKS_PER_HOST) as pool:
        yield pool


def my_network(groups: ParallelGroups) -> int:
    return os.stat("/proc/self/ns/net").st_ino


def gather(groups: ParallelGroups, of: str) -> list[int]:
    """The first number of every member's row of ROW_BYTES, each full of its rank."""
    group = getattr(groups, of)
    x = torch.full((1, ROW_BYTES // 8), groups.rank, dtype=torch.int64)
    gathered = group.all_gather(x, [1] * group.size)
    assert (gathered == gathered[:, :1]).all()
    return gathered[:, 0].tolist()


def test_the_ranks_of_a_node_share_a_host(testbed: Testbed, ranks: HostedRanks) -> None:
    expected = [
        os.stat(Path("/run/netns", testbed.namespace(host))).st_ino
        for host in range(HOSTS)
        for _ in range(RANKS_PER_HOST)
    ]
    assert ranks.run(my_network, TOPOLOGY) == expected
    assert len({*expected, os.stat("/proc/self/ns/net").st_ino}) == HOSTS + 1


def test_what_passes_between_hosts_is_on_the_links(testbed: Testbed, ranks: HostedRanks) -> None:
    before = [testbed.counters(host) for host in range(HOSTS)]
    assert ranks.run(gather, TOPOLOGY, "world") == [[0, 1, 2, 3]] * 4
    for host in range(HOSTS):
        moved = testbed.counters(host) - before[host]
        # The other host does not know my ranks' rows: they have to cross, whatever the algorithm.
        assert moved.tx_bytes >= RANKS_PER_HOST * ROW_BYTES
        assert moved.rx_bytes >= RANKS_PER_HOST * ROW_BYTES


def test_what_passes_inside_a_host_is_not(testbed: Testbed, ranks: HostedRanks) -> None:
    before = testbed.wire_bytes()
    assert ranks.run(gather, TOPOLOGY, "node") == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert testbed.wire_bytes() - before <= ROW_BYTES // 2  # connecting, and the last barrier


def test_fewer_nodes_than_hosts(ranks: HostedRanks) -> None:
    assert ranks.run(gather, Topology(num_nodes=1, ranks_per_node=2), "world") == [[0, 1]] * 2


@pytest.mark.parametrize(("nodes", "ranks_per_node"), [(3, 2), (2, 1), (1, 4)])
def test_a_topology_that_the_hosts_do_not_have(
    ranks: HostedRanks, nodes: int, ranks_per_node: int
) -> None:
    with pytest.raises(ValueError, match="2 hosts of 2 ranks cannot hold"):
        ranks.run(gather, Topology(num_nodes=nodes, ranks_per_node=ranks_per_node), "world")


def cut_and_gather(groups: ParallelGroups) -> list[int]:
    """The ranks of host 1 lose their link before they send a row."""
    groups.world.barrier()
    if groups.rank == RANKS_PER_HOST:
        subprocess.run(["ip", "link", "set", "e0", "down"], check=True, timeout=10)
    groups.node.barrier()
    return gather(groups, "world")


def test_a_cut_host_is_noticed_and_the_same_processes_go_on(
    testbed: Testbed, ranks: HostedRanks
) -> None:
    pids = ranks.pids
    try:
        outcomes = ranks.outcomes(cut_and_gather, TOPOLOGY, comm_timeout_s=COMM_TIMEOUT_S)
    finally:
        testbed.mend(1)
    assert [isinstance(outcome, CommError) for outcome in outcomes] == [True] * 4, outcomes
    assert ranks.run(gather, TOPOLOGY, "world") == [[0, 1, 2, 3]] * 4
    assert ranks.pids == pids
