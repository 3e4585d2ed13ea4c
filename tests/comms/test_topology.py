"""Rank arithmetic against an enumeration."""

import itertools

import pytest

from comms.topology import Topology

LAYOUTS = [
    (nodes, ranks, tp)
    for nodes, ranks in itertools.product((1, 2, 3), (1, 2, 3, 4))
    for tp in range(1, ranks + 1)
    if ranks % tp == 0
]


@pytest.mark.parametrize(("nodes", "ranks", "tp"), LAYOUTS)
def test_every_rank_is_where_enumeration_puts_it(nodes: int, ranks: int, tp: int) -> None:
    topology = Topology(num_nodes=nodes, ranks_per_node=ranks, tensor_parallel_size=tp)
    places = list(itertools.product(range(nodes), range(ranks // tp), range(tp)))
    assert topology.world_size == len(places)
    assert topology.num_replicas == nodes * ranks // tp
    for rank, (node, replica_of_node, tp_rank) in enumerate(places):
        assert topology.node_of(rank) == node
        assert topology.local_rank_of(rank) == replica_of_node * tp + tp_rank
        assert topology.tp_rank_of(rank) == tp_rank
        replica = node * (ranks // tp) + replica_of_node
        assert topology.replica_of(rank) == replica
        assert topology.tp_ranks(replica)[tp_rank] == rank
        assert topology.node_ranks(node)[topology.local_rank_of(rank)] == rank
        assert topology.rail_ranks(topology.local_rank_of(rank))[node] == rank
        assert (rank in topology.leader_ranks) == (tp_rank == 0)
    assert topology.leader_ranks == tuple(
        topology.tp_ranks(replica)[0] for replica in range(topology.num_replicas)
    )


def test_tensor_parallel_size_defaults_to_the_node() -> None:
    assert Topology(num_nodes=2, ranks_per_node=3).tensor_parallel_size == 3


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((0, 2, 1), "num_nodes=0"),
        ((1, 0, 1), "ranks_per_node=0"),
        ((1, 4, 3), "4 % 3"),
        ((1, 4, -2), "4 % -2"),
    ],
)
def test_impossible_layouts_show_the_values(sizes, message) -> None:
    nodes, ranks, tp = sizes
    with pytest.raises(ValueError, match=message):
        Topology(num_nodes=nodes, ranks_per_node=ranks, tensor_parallel_size=tp)


def test_unknown_ranks_are_refused() -> None:
    topology = Topology(num_nodes=2, ranks_per_node=2, tensor_parallel_size=1)
    with pytest.raises(ValueError, match=r"rank must be in \[0, 4\), got 4"):
        topology.node_of(4)
    with pytest.raises(ValueError, match=r"node must be in \[0, 2\), got 2"):
        topology.node_ranks(2)
    with pytest.raises(ValueError, match=r"local_rank must be in \[0, 2\), got -1"):
        topology.rail_ranks(-1)
    with pytest.raises(ValueError, match=r"replica must be in \[0, 4\), got 4"):
        topology.tp_ranks(4)
