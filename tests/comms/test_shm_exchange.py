"""Exchanges over shared memory against their definition: each gets what the others sent to it."""

import random
import time
from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from comms.diagnosis import Diagnosis
from comms.groups import CommError, ParallelGroups
from comms.shm import ShmGroup
from comms.store import connect_store, host_store
from comms.topology import Topology
from comms.where import Where

TWO = Topology(num_nodes=1, ranks_per_node=2)


def group_of(groups: ParallelGroups, address: str, capacity: int) -> ShmGroup:
    store = connect_store(address)
    return ShmGroup(
        name=f"exchange@{groups.epoch}",
        ranks=groups.world.ranks,
        rank=groups.rank,
        store=store,
        diagnosis=Diagnosis(store, groups.rank, Where()),
        capacity=capacity,
        timeout_s=30.0,
    )


@dataclass(frozen=True)
class Step:
    """One exchange: what everybody sends to everybody, and how it is called."""

    chunks: tuple[tuple[tuple[int, ...], ...], ...]  # bytes by chunk, source, destination
    waits: bool  # for its result before the next one starts
    barrier: bool  # another operation right after it has started


@st.composite
def plans(draw: st.DrawFn) -> tuple[int, int, list[Step]]:
    """(world size, capacity, steps); most messages fit into a segment, some take many rounds."""
    world = draw(st.integers(2, 4))
    capacity = draw(st.sampled_from([64, 192, 4096]))
    size = st.one_of(st.just(0), st.integers(0, capacity // 4), st.integers(0, 5 * capacity))
    row = st.tuples(*[size] * world)
    chunks = st.lists(st.tuples(*[row] * world), max_size=3).map(tuple)
    steps = draw(st.lists(st.builds(Step, chunks, st.booleans(), st.booleans()), max_size=5))
    return world, capacity, steps


def message(step: int, chunk: int, source: int, destination: int, num_bytes: int) -> Tensor:
    data = random.Random(f"{step}/{chunk}/{source}/{destination}").randbytes(num_bytes)
    return torch.frombuffer(bytearray(data + b"\0"), dtype=torch.uint8)[:num_bytes]


def expected(step: int, plan: Step, destination: int, world: int) -> list[bytes]:
    return [
        b"".join(
            bytes(message(step, c, source, destination, sizes[source][destination]).numpy())
            for c, sizes in enumerate(plan.chunks)
        )
        for source in range(world)
    ]


def follow(groups: ParallelGroups, address: str, capacity: int, steps: list[Step]) -> None:
    """All steps, ranks late at random; results are compared at the end, when memory was reused."""
    group, naps = group_of(groups, address, capacity), random.Random(groups.rank)
    me, world = group.idx, group.size
    started, results = [], {}
    for i, step in enumerate(steps):
        if naps.random() < 0.3:
            time.sleep(naps.random() * 2e-3)
        chunks = [
            [message(i, c, me, j, sizes[me][j]) for j in range(world)]
            for c, sizes in enumerate(step.chunks)
        ]
        if len(chunks) == 1 and step.waits:
            results[i] = group.exchange(chunks[0], f"step {i}")
            continue
        started.append((i, group.start_exchange(iter(chunks), f"step {i}")))
        if step.barrier:
            group.barrier()
        if step.waits:
            results.update((k, pending.wait()) for k, pending in started)
            started = []
    results.update((k, pending.wait()) for k, pending in started)
    group.barrier()
    for i, step in enumerate(steps):
        assert [bytes(part.numpy()) for part in results[i]] == expected(i, step, me, world)
    group.close()


@pytest.fixture(scope="module")
def address():
    store, text = host_store()
    yield text
    del store


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(plan=plans())
def test_everybody_gets_what_was_sent_to_them(rank_pool, address, plan) -> None:
    world, capacity, steps = plan
    rank_pool.run(follow, Topology(num_nodes=1, ranks_per_node=world), address, capacity, steps)


def many_megabytes(groups: ParallelGroups) -> None:
    size = [3_000_001, 5][groups.rank]
    mine = torch.full((size,), groups.rank + 1, dtype=torch.uint8)
    theirs = torch.full((3_000_006 - size,), 2 - groups.rank, dtype=torch.uint8)
    parts = groups.world.exchange([mine, mine], "large")
    assert torch.equal(parts[1 - groups.rank], theirs)
    assert parts[groups.rank] is mine


def test_large_and_small_cross_in_one_exchange(rank_pool) -> None:
    rank_pool.run(many_megabytes, TWO)


def start_alone(groups: ParallelGroups, address: str) -> tuple[list[float], bool]:
    """Rank 1 starts only when rank 0's start has returned, and later than rank 0's wait."""
    store, part = connect_store(address), torch.ones(9, dtype=torch.uint8)
    key = f"started/{groups.epoch}"
    if groups.rank == 1:
        store.get(key)
        time.sleep(0.3)
    called = time.perf_counter()
    pending = groups.world.start_exchange([[part, part]], "alone")
    if groups.rank == 0:
        store.set(key, "1")
    pending.wait()
    return pending.waits, called < pending.finished <= time.perf_counter()


def test_start_returns_before_the_peers_come_and_waits_are_measured(rank_pool, address) -> None:
    (early, early_finished), (late, late_finished) = rank_pool.run(start_alone, TWO, address)
    assert early_finished
    assert late_finished
    assert early[0] == 0.0
    assert early[1] > 0.2
    assert late == [0.0, 0.0]


def other_stage(groups: ParallelGroups) -> None:
    parts = [torch.ones(3, dtype=torch.uint8)] * 2
    groups.world.exchange(parts, ["dispatch/node", "combine/node"][groups.rank])


def other_operation(groups: ParallelGroups) -> None:
    if groups.rank == 0:
        other_stage(groups)
    else:
        groups.world.barrier()


@pytest.mark.parametrize(
    ("fn", "theirs"), [(other_stage, "combine/node"), (other_operation, "barrier")]
)
def test_the_members_must_be_in_the_same_stage(rank_pool, fn, theirs) -> None:
    outcomes = rank_pool.outcomes(fn, TWO)
    assert all(isinstance(error, CommError) for error in outcomes)
    told = [f"rank 1 called {theirs} while rank 0 called dispatch/node",
            f"rank 0 called dispatch/node while rank 1 called {theirs}"]  # fmt: skip
    for error in outcomes:
        assert any(text in str(error) for text in told)


def refused(groups: ParallelGroups) -> None:
    good = torch.ones(3, dtype=torch.uint8)
    for parts in ([good], [good, good.float()], [good, good.reshape(1, 3)]):
        with pytest.raises(ValueError, match="expected"):
            groups.world.exchange(parts, "refused")
        with pytest.raises(ValueError, match="expected"):
            groups.world.start_exchange([parts], "refused")
    assert torch.equal(groups.world.exchange([good, good], "fine")[1 - groups.rank], good)


def test_wrong_parts_are_refused_and_harm_nothing(rank_pool) -> None:
    rank_pool.run(refused, TWO)
