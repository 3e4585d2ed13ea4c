"""Counts of all: of the ranks of my node, and of each node, on threads and on real ranks."""

import numpy as np
import pytest

from comms.counts import CountExchange
from comms.make import make_dispatcher
from comms.topology import Topology
from tests.comms.thread_world import run_threads

NUM_EXPERTS = 9


def exchange(groups, counts_E):
    dispatcher = make_dispatcher("hierarchical", groups, slots_per_rank=4, hidden=32)
    groups.where.layer = 3
    counts = CountExchange(dispatcher)(counts_E)
    return counts, dispatcher.ledger


def check(topology, counts_RE, results):
    by_node = counts_RE.reshape(topology.num_nodes, topology.ranks_per_node, NUM_EXPERTS)
    for rank, (counts, _) in enumerate(results):
        assert np.array_equal(counts.nodes_NE, by_node.sum(axis=1))
        assert np.array_equal(counts.ranks_ME, by_node[topology.node_of(rank)])
        assert counts.nodes_NE.dtype == counts.ranks_ME.dtype == np.int64


@pytest.mark.parametrize(("nodes", "ranks"), [(1, 1), (1, 3), (3, 1), (2, 3)])
def test_every_rank_learns_its_node_and_all_nodes(nodes, ranks):
    topology = Topology(num_nodes=nodes, ranks_per_node=ranks)
    counts_RE = np.random.default_rng(1).integers(0, 1 << 29, (nodes * ranks, NUM_EXPERTS))
    counts_RE[-1] = 0
    check(topology, counts_RE, run_threads(exchange, topology, counts_RE))


def exchange_mine(groups, counts_RE):
    return exchange(groups, counts_RE[groups.rank])


def test_over_shared_memory_and_tcp_with_every_byte_booked(rank_pool):
    topology = Topology(num_nodes=2, ranks_per_node=2)
    counts_RE = np.arange(4 * NUM_EXPERTS).reshape(4, NUM_EXPERTS)
    results = rank_pool.run(exchange_mine, topology, counts_RE)
    check(topology, counts_RE, results)
    for _, ledger in results:
        assert ledger.intra_node_bytes("counts/node") == 4 * NUM_EXPERTS
        assert ledger.inter_node_bytes("counts/rail") == 4 * NUM_EXPERTS
        assert {row["layer"] for row in ledger.layer_rows()} == {3}


@pytest.mark.parametrize("counts", [[[1, 2]], [-1, 2], [1 << 31]])
def test_counts_that_do_not_fit_are_refused(counts):
    topology = Topology(num_nodes=1, ranks_per_node=1)
    with pytest.raises(ValueError, match="counts must be"):
        run_threads(exchange, topology, [np.array(counts)])
