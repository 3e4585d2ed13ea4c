"""Collectives of all transports against torch sums and concatenations of plain tensors."""

import os
import random
import time

import pytest
import torch
from torch import Tensor

from comms.diagnosis import Diagnosis
from comms.groups import CommError, Group, ParallelGroups
from comms.shm import ShmGroup
from comms.sizes import even_sizes
from comms.store import connect_store, host_store
from comms.topology import Topology

DTYPES = (
    torch.float32,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.int64,
    torch.float64,
    torch.bool,
)
SIZES = ([2, 0, 3, 1], [0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 900, 0], [700, 3, 0, 500])
SUMMED = (torch.float32, torch.bfloat16, torch.int64, torch.float64)
TRANSPORTS = {
    "shm": {"node_backend": "shm"},
    "tcp": {"node_backend": "gloo", "inter_node_backend": "tcp"},
    "gloo": {"node_backend": "gloo", "inter_node_backend": "gloo"},
}


def rows_of(rank: int, num_rows: int, dtype: torch.dtype, tail: tuple[int, ...] = (7,)) -> Tensor:
    """What `rank` brings: random, but every rank can work out everybody's."""
    generator = torch.Generator().manual_seed(100 * rank + num_rows)
    if not dtype.is_floating_point:
        return torch.randint(0, 2 if dtype == torch.bool else 1000, (num_rows, *tail),
                             generator=generator).to(dtype)  # fmt: skip
    return torch.randn((num_rows, *tail), generator=generator, dtype=torch.float64).to(dtype)


def same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and bytes_of(a) == bytes_of(b)


def bytes_of(x: Tensor) -> bytes:
    return bytes(x.contiguous().reshape(-1).view(torch.uint8).numpy())


def sum_of(parts: list[Tensor]) -> Tensor:
    """The documented rule: fp32 in rank order, then one cast."""
    wide = torch.float32 if parts[0].dtype == torch.bfloat16 else parts[0].dtype
    total = torch.zeros(parts[0].shape, dtype=wide)
    for part in parts:
        total = total + part.to(wide)
    return total.to(parts[0].dtype)


def check_group(group: Group, scale: int = 1) -> None:
    """Every collective, dtype and shape on one group; `scale` multiplies all sizes."""
    n, me = group.size, group.idx
    for sizes in ([size * scale for size in sizes[:n]] for sizes in SIZES):
        for dtype in DTYPES:
            all_rows = [rows_of(i, sizes[i], dtype) for i in range(n)]
            assert same(group.all_gather(all_rows[me], sizes), torch.cat(all_rows))
            blocks = [[rows_of(10 * i + j, sizes[(i + j) % n], dtype) for j in range(n)]
                      for i in range(n)]  # fmt: skip
            sent = [len(block) for block in blocks[me]]
            received = [len(blocks[i][me]) for i in range(n)]
            got = group.all_to_all(torch.cat(blocks[me]), sent, received)
            assert same(got, torch.cat([blocks[i][me] for i in range(n)]))
            for source in range(n):
                x = rows_of(source, 3 * scale, dtype, (2, 5))
                mine = x if me == source else torch.full_like(x.float(), 9).to(dtype)
                assert same(group.broadcast(mine, source), x)
        for dtype in SUMMED:
            wholes = [rows_of(i, sum(sizes), dtype) for i in range(n)]
            expected = sum_of(wholes)
            assert same(group.all_reduce(wholes[me]), expected)
            mine = torch.split(expected, sizes)[me]
            assert same(group.reduce_scatter(wholes[me], sizes), mine)
    for source in range(n):
        for data in (b"", b"x", os.urandom(5) * 1000 * scale):
            size = len(data)
            got = group.broadcast_bytes(data if me == source else None, source)
            assert len(got) == size
            if me == source or size < 2:
                assert got == data
            else:
                assert got == got[:5] * (size // 5)
    strided = rows_of(me, 6, torch.float32).t()
    assert same(
        group.all_reduce(strided), sum_of([rows_of(i, 6, torch.float32).t() for i in range(n)])
    )
    assert same(group.all_reduce(torch.tensor(me)), torch.tensor(n * (n - 1) // 2))
    group.barrier()


def check_all_groups(groups: ParallelGroups) -> dict[str, tuple[int, ...]]:
    named = {name: getattr(groups, name) for name in ("world", "node", "rail", "tp", "leaders")}
    for group in named.values():
        if group is not None and group.size <= 4:
            check_group(group)
    return {name: group.ranks for name, group in named.items() if group is not None}


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize(("nodes", "ranks", "tp"), [(1, 4, 2), (2, 2, 1), (1, 1, 1), (3, 1, 1)])
def test_collectives_equal_plain_torch(rank_pool, transport, nodes, ranks, tp) -> None:
    topology = Topology(num_nodes=nodes, ranks_per_node=ranks, tensor_parallel_size=tp)
    for rank, members in enumerate(
        rank_pool.run(check_all_groups, topology, **TRANSPORTS[transport])
    ):
        node, local = divmod(rank, ranks)
        assert members["world"] == tuple(range(nodes * ranks))
        assert members["node"] == tuple(range(node * ranks, (node + 1) * ranks))
        assert members["rail"] == tuple(local + ranks * i for i in range(nodes))
        assert members["tp"] == tuple(range(rank // tp * tp, (rank // tp + 1) * tp))
        assert members.get("leaders") == (tuple(range(0, nodes * ranks, tp)) if rank % tp == 0 else None)  # fmt: skip


def check_tiny_segments(groups: ParallelGroups, address: str) -> None:
    store = connect_store(address)
    group = ShmGroup(
        name="tiny",
        ranks=range(groups.topology.world_size),
        rank=groups.rank,
        store=store,
        diagnosis=Diagnosis(store, groups.rank, groups.where),
        capacity=192,
    )
    check_group(group)
    group.close()


def test_data_beyond_the_segments_goes_in_rounds(rank_pool) -> None:
    store, address = host_store()
    rank_pool.run(check_tiny_segments, Topology(num_nodes=1, ranks_per_node=3), address)
    del store


def check_large(groups: ParallelGroups) -> None:
    """Beyond the one-shot size and one segment, and the same bits from all transports."""
    for numel in (20_001, 900_000):
        x = rows_of(groups.rank, numel, torch.bfloat16, ())
        parts = [rows_of(i, numel, torch.bfloat16, ()) for i in range(groups.world.size)]
        assert same(groups.world.all_reduce(x), sum_of(parts))
        sizes = even_sizes(numel, groups.world.size)
        mine = torch.split(sum_of(parts), sizes)[groups.world.idx]
        assert same(groups.world.reduce_scatter(x, sizes), mine)
        data = bytes_of(parts[1])
        got = groups.world.broadcast_bytes(data if groups.rank == 1 else None, 1)
        assert got == data


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_large_sums_have_the_same_bits_on_all_transports(rank_pool, transport) -> None:
    topology = Topology(num_nodes=1, ranks_per_node=3)
    rank_pool.run(check_large, topology, **TRANSPORTS[transport])


def wrong_sizes(groups: ParallelGroups) -> None:
    x = torch.zeros(3, 2)
    bad = [
        lambda: groups.world.all_gather(x, [3]),
        lambda: groups.world.all_gather(x, [2, 2]),
        lambda: groups.world.reduce_scatter(x, [4, -1]),
        lambda: groups.world.all_to_all(x, [1, 1], [1, 1]),
    ]
    for call in bad:
        with pytest.raises(ValueError, match=r"expected .* got"):
            call()
    groups.world.barrier()  # refused before anything was sent: the group still works


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_impossible_sizes_are_refused_and_harm_nothing(rank_pool, transport) -> None:
    rank_pool.run(wrong_sizes, Topology(num_nodes=1, ranks_per_node=2), **TRANSPORTS[transport])


def disagree(groups: ParallelGroups) -> None:
    if groups.rank == 0:
        groups.world.all_reduce(torch.zeros(4))
    else:
        groups.world.all_gather(torch.zeros(4), [4, 4])


@pytest.mark.parametrize("transport", ["shm", "tcp"])  # gloo cannot tell
def test_disagreeing_calls_are_named(rank_pool, transport) -> None:
    topology = Topology(num_nodes=1, ranks_per_node=2)
    outcomes = rank_pool.outcomes(disagree, topology, **TRANSPORTS[transport])
    assert all(isinstance(error, CommError) for error in outcomes)
    text = " ".join(str(error) for error in outcomes)
    assert "called all_gather while rank 0 called all_reduce" in text or (
        "called all_reduce while rank 1 called all_gather" in text
    )


def stress(groups: ParallelGroups, address: str, seed: int) -> None:
    """A long random run of mixed collectives over tiny segments, every rank late at random.

    A source runs ahead of slow receivers here: a half overwritten too early shows as wrong data.
    """
    world = groups.world.size
    store = connect_store(address)
    group = ShmGroup(
        name=f"stress{seed}",
        ranks=range(world),
        rank=groups.rank,
        store=store,
        diagnosis=Diagnosis(store, groups.rank, groups.where),
        capacity=128,
    )
    plan, naps = random.Random(seed), random.Random(1000 * seed + groups.rank)
    for step in range(300):
        operation, source = plan.randrange(5), plan.randrange(world)
        numel = plan.choice([1, 8, 30, 200])
        if naps.random() < 0.1:
            time.sleep(naps.random() * 3e-3)
        bring = [torch.arange(numel, dtype=torch.int64) * (i + 1) + step for i in range(world)]
        mine = bring[groups.rank]
        if operation == 0:
            assert torch.equal(group.all_reduce(mine), sum(bring))
        elif operation == 1:
            assert torch.equal(group.all_gather(mine, [numel] * world), torch.cat(bring))
        elif operation == 2:
            sizes = even_sizes(numel, world)
            got = group.all_to_all(mine, sizes, [sizes[groups.rank]] * world)
            parts = [torch.split(x, sizes)[groups.rank] for x in bring]
            assert torch.equal(got, torch.cat(parts))
        elif operation == 3:
            got = group.broadcast(mine if groups.rank == source else torch.zeros_like(mine), source)
            assert torch.equal(got, bring[source])
        else:
            data = bytes_of(bring[source])
            got = group.broadcast_bytes(data if groups.rank == source else None, source)
            assert got == data
    group.close()


@pytest.mark.parametrize("seed", [1, 2])
def test_late_ranks_never_see_overwritten_data(rank_pool, seed: int) -> None:
    store, address = host_store()
    rank_pool.run(stress, Topology(num_nodes=1, ranks_per_node=4), address, seed)
    del store
