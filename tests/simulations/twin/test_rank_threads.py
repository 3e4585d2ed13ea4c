"""Ranks as threads: their collectives are those of every group, and errors end all."""

import pytest
import torch

from comms.base import BaseDispatcher
from comms.counts import CountExchange
from comms.groups import ParallelGroups
from comms.make import make_dispatcher
from comms.topology import Topology
from simulations.twin.rank_threads import run_ranks

TOPOLOGY = Topology(num_nodes=2, ranks_per_node=3)


def everything(groups: ParallelGroups) -> dict[str, list]:
    rank, world, node = groups.rank, groups.world, groups.node
    x = torch.arange(6 * 2).view(6, 2) + 100 * rank
    part = torch.tensor([rank, rank + 10], dtype=torch.uint8)
    data = bytes([rank]) if rank == 2 else None
    world.barrier()
    return {
        "all_gather": world.all_gather(x[:rank], [0, 1, 2, 3, 4, 5])[:, 0].tolist(),
        "all_reduce": node.all_reduce(x)[0].tolist(),
        "reduce_scatter": world.reduce_scatter(x, [1] * 6).tolist(),
        "all_to_all": world.all_to_all(x, [1] * 6, [1] * 6)[:, 0].tolist(),
        "exchange": [p.tolist() for p in groups.rail.exchange([part, part[:1]], "test")],
        "broadcast": world.broadcast(x[0] if rank == 4 else torch.zeros(2).long(), 4).tolist(),
        "broadcast_bytes": list(world.broadcast_bytes(data, 2)),
    }


def test_collectives_are_what_their_definitions_say():
    results = run_ranks(TOPOLOGY, everything)
    for rank, found in enumerate(results):
        node = rank // 3 * 3
        peers = (node, node + 1, node + 2)
        assert found["all_gather"] == [100 * r + 2 * i for r in range(6) for i in range(r)]
        assert found["all_reduce"] == [sum(100 * r + c for r in peers) for c in (0, 1)]
        sums = [sum(100 * r + 2 * rank + c for r in range(6)) for c in (0, 1)]
        assert found["reduce_scatter"] == [sums]
        assert found["all_to_all"] == [100 * r + 2 * rank for r in range(6)]
        rail = (rank % 3, rank % 3 + 3)
        cut = 2 if rank < 3 else 1
        assert found["exchange"] == [[r, r + 10][:cut] for r in rail]
        assert found["broadcast"] == [400, 401]
        assert found["broadcast_bytes"] == [2]


def counted(groups: ParallelGroups) -> tuple[list[int], int]:
    dispatcher: BaseDispatcher = make_dispatcher("hierarchical", groups, slots_per_rank=2, hidden=8)
    exchange = CountExchange(dispatcher)
    for _ in range(3):
        counts = exchange(torch.full((4,), groups.rank).numpy())
    return counts.nodes_NE[:, 0].tolist(), sum(dispatcher.ledger.num_bytes.values())


def test_counts_are_exchanged_and_booked():
    """Two peers in the node and one on the rail get four counts of four bytes, three times."""
    assert run_ranks(TOPOLOGY, counted) == [([3, 12], 3 * 3 * 16)] * 6


def test_the_first_error_ends_all_ranks():
    def failing(groups: ParallelGroups) -> None:
        if groups.rank == 4:
            raise KeyError("rank 4 has none")
        groups.world.barrier()

    with pytest.raises(KeyError, match="rank 4 has none"):
        run_ranks(TOPOLOGY, failing, timeout_s=60)
