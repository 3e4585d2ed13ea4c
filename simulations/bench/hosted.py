"""HostedRanks: a RankPool whose nodes are hosts of a testbed.

The ranks of node i live in host i's network namespace, so what passes between nodes crosses the
limited links and is counted there; ranks of one node share memory as on a real host. The rendezvous
store is at the switch, so that cutting any host off leaves it to the others.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from comms.launch import RankPool
from comms.store import host_store
from comms.topology import Topology
from simulations import netns
from simulations.testbed import Testbed


class HostedRanks(RankPool):
    """RankPool on the hosts of a testbed that is up; close it before the testbed goes down.

    Every topology has `ranks_per_host` ranks per node and at most as many nodes as there are hosts.
    """

    def __init__(self, testbed: Testbed, ranks_per_host: int) -> None:
        if ranks_per_host < 1:
            raise ValueError(f"a host has at least one rank, got ranks_per_host={ranks_per_host}")
        self.testbed = testbed
        self.ranks_per_host = ranks_per_host
        namespaces = [testbed.namespace(host) for host in range(testbed.hosts)]
        super().__init__(
            testbed.hosts * ranks_per_host,
            place=partial(_enter_host, namespaces, ranks_per_host),
            store=netns.call(testbed.switch, partial(host_store, testbed.switch_address)),
        )

    def outcomes(
        self, fn: Callable[..., Any], topology: Topology, *args: Any, **options: Any
    ) -> list[Any]:
        """As RankPool's; raises ValueError for a topology that the hosts do not have."""
        fits = topology.num_nodes <= self.testbed.hosts
        if topology.ranks_per_node != self.ranks_per_host or not fits:
            raise ValueError(
                f"{self.testbed.hosts} hosts of {self.ranks_per_host} ranks cannot hold "
                f"{topology.num_nodes} nodes of {topology.ranks_per_node}"
            )
        return super().outcomes(fn, topology, *args, **options)


@contextmanager
def ranks_on(hosts: int, ranks_per_host: int, rate: str | None) -> Iterator[RankPool]:
    """Ranks on a testbed of their own; with 0 hosts, plain ranks on loopback."""
    if hosts == 0:
        with RankPool() as pool:
            yield pool
    else:
        with Testbed(hosts, rate) as testbed, HostedRanks(testbed, ranks_per_host) as pool:
            yield pool


def _enter_host(namespaces: list[str], ranks_per_host: int, rank: int) -> None:
    netns.enter(namespaces[rank // ranks_per_host])
