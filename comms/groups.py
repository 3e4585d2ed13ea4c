"""All groups of one rank, of one epoch, passed in by whoever builds them: never a global.

A group inside one node runs over shared memory; a group that crosses nodes runs over TCP, by our own
transport or by gloo. After a failure the survivors abort the epoch's groups and connect the next
epoch's.
"""

import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from comms.diagnosis import Diagnosis
from comms.gloo import GlooGroup
from comms.group import CommError, CommTimeout, Group
from comms.links import LinkSpeed, measure_links
from comms.shm import ShmGroup
from comms.solo import SoloGroup
from comms.store import PrefixStore, Store, TCPStore
from comms.tcp import TcpGroup
from comms.topology import Topology
from comms.where import Where

__all__ = [
    "CommError",
    "CommTimeout",
    "Group",
    "InterNodeBackend",
    "NodeBackend",
    "ParallelGroups",
]

NodeBackend = Literal["shm", "gloo"]
InterNodeBackend = Literal["tcp", "gloo"]


@dataclass(frozen=True, kw_only=True)
class ParallelGroups:
    """The groups this rank is in.

    world: all ranks. node: my node's ranks. rail: my local rank on every node. tp: my replica.
    leaders: the leader of every replica; None on other ranks. where: the step and layer that this
    rank is in, for the errors of all groups; whoever runs the model writes it. links: how fast the
    rails are, the same on all ranks; None where that was not measured or there is one node.
    host: our address for peers. store: of this epoch, where all ranks meet; None for a world of one that
    was made without.
    """

    topology: Topology
    rank: int
    epoch: int
    world: Group
    node: Group
    rail: Group
    tp: Group
    leaders: Group | None
    where: Where = field(default_factory=Where)
    links: LinkSpeed | None = None
    host: str = "127.0.0.1"
    store: Store | None = None

    @classmethod
    def connect(
        cls,
        topology: Topology,
        rank: int,
        store: TCPStore,
        *,
        epoch: int = 0,
        node_backend: NodeBackend = "shm",
        inter_node_backend: InterNodeBackend = "tcp",
        timeout_s: float = 60.0,
        with_links: bool = False,
    ) -> "ParallelGroups":
        """Connect all groups; every rank of the topology calls this with the same arguments.

        node_backend "gloo" means no shared memory: inside a node too, ranks use what
        `inter_node_backend` says. `timeout_s` is the deadline of each wait, now and in every later
        collective. `with_links` measures the links, some 10 ms.
        Raises CommTimeout naming the ranks that did not come.
        """
        if node_backend not in ("shm", "gloo"):
            raise ValueError(f"node_backend must be 'shm' or 'gloo', got {node_backend!r}")
        if inter_node_backend not in ("tcp", "gloo"):
            raise ValueError(
                f"inter_node_backend must be 'tcp' or 'gloo', got {inter_node_backend!r}"
            )
        scoped = PrefixStore(f"epoch{epoch}", store)
        host = _address_towards(store.host)
        where = Where()
        diagnosis = Diagnosis(scoped, rank, where)
        across: type[TcpGroup] | type[GlooGroup] = (
            TcpGroup if inter_node_backend == "tcp" else GlooGroup
        )

        def group(name: str, ranks: Sequence[int]) -> Group:
            name = f"{name}@{epoch}"
            if len(ranks) == 1:
                return SoloGroup(name=name, rank=rank)
            key = f"{name}/{ranks[0]}"
            one_node = len({topology.node_of(r) for r in ranks}) == 1
            if one_node and node_backend == "shm":
                return ShmGroup(
                    name=key,
                    ranks=ranks,
                    rank=rank,
                    store=scoped,
                    diagnosis=diagnosis,
                    timeout_s=timeout_s,
                )
            return across(
                name=key,
                ranks=ranks,
                rank=rank,
                store=scoped,
                diagnosis=diagnosis,
                timeout_s=timeout_s,
                host=host,
            )

        groups = cls._build(topology, rank, epoch, group, where)
        links = measure_links(groups.rail, groups.world) if with_links else None
        return replace(groups, links=links, host=host, store=scoped)

    @classmethod
    def _build(
        cls,
        topology: Topology,
        rank: int,
        epoch: int,
        group: Callable[[str, Sequence[int]], Group],
        where: Where,
    ) -> "ParallelGroups":
        leaders = topology.leader_ranks
        return cls(
            topology=topology,
            rank=rank,
            epoch=epoch,
            world=group("world", range(topology.world_size)),
            node=group("node", topology.node_ranks(topology.node_of(rank))),
            rail=group("rail", topology.rail_ranks(topology.local_rank_of(rank))),
            tp=group("tp", topology.tp_ranks(topology.replica_of(rank))),
            leaders=group("leaders", leaders) if rank in leaders else None,
            where=where,
        )

    def abort(self) -> None:
        """Make every group unusable and wake whoever waits in one, here and on the peers."""
        for group in self._all():
            group.abort()

    def close(self) -> None:
        """Free everything. Call it when all ranks are past their last collective."""
        for group in self._all():
            group.close()

    def _all(self) -> list[Group]:
        groups = [self.world, self.node, self.rail, self.tp]
        return groups if self.leaders is None else [*groups, self.leaders]


def _address_towards(host: str) -> str:
    """My address on the route to `host`, so that peers which reach the store also reach me."""
    family, kind, _, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(address)  # a datagram socket: nothing is sent
        return str(probe.getsockname()[0])
