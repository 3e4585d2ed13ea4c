"""Exchanges over every transport: what arrives, in what order, and what happens when it does not."""

import os
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from comms.diagnosis import Diagnosis
from comms.group import CommError, CommTimeout
from comms.groups import ParallelGroups
from comms.launch import RankPool
from comms.solo import SoloGroup
from comms.store import connect_store, host_store
from comms.tcp import TcpGroup
from comms.topology import Topology
from comms.where import Where
from tests.comms.test_collectives import TRANSPORTS

THREE = Topology(num_nodes=1, ranks_per_node=3)
TCP = TRANSPORTS["tcp"]
DEADLINE_S = 0.8
SLACK_S = 15.0  # it takes milliseconds unless the machine is starved


def part_of(exchange: int, chunk: int, source: int, destination: int, num_bytes: int) -> Tensor:
    """Bytes that anybody can work out, different for every part."""
    seed = 1 + 7 * exchange + 31 * chunk + 101 * source + 57 * destination
    return (torch.arange(num_bytes) * seed + seed // 3).to(torch.uint8)


def check_exchanges(groups: ParallelGroups, plan: list, in_flight: int) -> None:
    """plan[exchange][chunk][source][destination] = bytes; `in_flight` exchanges at a time."""
    world, me = groups.world, groups.world.idx
    pending = []

    def finish() -> None:
        exchange, mine = pending.pop(0)
        received = mine.wait()
        assert len(received) == len(mine.waits) == world.size
        for source, got in enumerate(received):
            parts = [
                part_of(exchange, k, source, me, sizes[source][me])
                for k, sizes in enumerate(plan[exchange])
            ]
            assert got.dtype == torch.uint8
            assert torch.equal(got, torch.cat([torch.empty(0, dtype=torch.uint8), *parts]))

    for exchange, chunks in enumerate(plan):
        made = (
            [part_of(exchange, k, me, j, sizes[me][j]) for j in range(world.size)]
            for k, sizes in enumerate(chunks)
        )
        as_list = exchange % 2 == 1  # a list tells how many chunks there are, a generator does not
        stage = f"stage {exchange % 3}"
        pending.append((exchange, world.start_exchange(list(made) if as_list else made, stage)))
        if len(pending) == in_flight:
            finish()
    while pending:
        finish()
    world.barrier()


NUM_BYTES = st.sampled_from([0, 0, 1, 13, 4096, 8191, 8192, 16370, 16384, 70_000, 300_000, 2_500_000])  # fmt: skip
CHUNK = st.lists(st.lists(NUM_BYTES, min_size=3, max_size=3), min_size=3, max_size=3)
PLAN = st.lists(st.lists(CHUNK, min_size=1, max_size=3), min_size=1, max_size=4)


@pytest.mark.parametrize("transport", TRANSPORTS)
@given(plan=PLAN, in_flight=st.integers(1, 3))
@settings(max_examples=12, deadline=None)
def test_every_byte_arrives_where_it_belongs(rank_pool, transport, plan, in_flight) -> None:
    rank_pool.run(check_exchanges, THREE, plan, in_flight, **TRANSPORTS[transport])


def both_ways(groups: ParallelGroups, num_bytes: int) -> None:
    world, me = groups.world, groups.world.idx
    parts = [part_of(0, 0, me, j, num_bytes) for j in range(world.size)]
    for source, got in enumerate(world.exchange(parts, "dispatch")):
        assert torch.equal(got, part_of(0, 0, source, me, num_bytes))


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_all_members_may_send_much_at_once(rank_pool, transport) -> None:
    """More than sockets and segments hold: whoever sends first and reads later would hang."""
    pair = Topology(num_nodes=1, ranks_per_node=2)
    rank_pool.run(both_ways, pair, 48 << 20, **TRANSPORTS[transport])


def run_ahead(groups: ParallelGroups, seconds: float) -> None:
    """One-sided operations let the source run ahead of the others, through different ones."""
    world = groups.world
    for step in range(40):
        if groups.rank == 1 and step == 5:
            time.sleep(seconds)
        x = part_of(step, 0, 0, 0, 50_000)
        got = world.broadcast(x if world.idx == 0 else torch.zeros_like(x), 0)
        assert torch.equal(got, x)
        data = bytes(x.numpy())
        assert world.broadcast_bytes(data if world.idx == 0 else None, 0) == data


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_source_may_run_ahead(rank_pool, transport) -> None:
    rank_pool.run(run_ahead, THREE, 0.3, **TRANSPORTS[transport])


def late_rank_1(groups: ParallelGroups) -> tuple[list[float], float]:
    world = groups.world
    world.barrier()
    if groups.rank == 1:
        time.sleep(0.5)
    pending = world.start_exchange([[torch.ones(10, dtype=torch.uint8)] * 3], "dispatch")
    start = time.perf_counter()
    pending.wait()
    assert start - 60 < pending.finished <= time.perf_counter()
    return pending.waits, pending.finished - start


@pytest.mark.parametrize("transport", ["shm", "tcp"])  # gloo does not tell peers apart
def test_waits_say_who_was_late(rank_pool, transport) -> None:
    answers = rank_pool.run(late_rank_1, THREE, **TRANSPORTS[transport])
    for rank in (0, 2):
        waits, until_finished = answers[rank]
        assert waits[rank] == 0.0
        assert min(waits) >= 0.0
        assert waits[1] == max(waits) > waits[2 - rank]
        assert waits[1] == pytest.approx(until_finished, abs=0.02)


def wrong_parts(groups: ParallelGroups) -> None:
    world, part = groups.world, torch.zeros(2, dtype=torch.uint8)
    for parts in ([part], [part.long()] * 2, [part.view(1, 2)] * 2):
        with pytest.raises(ValueError, match=r"expected .* got"):
            world.exchange(parts, "dispatch")
    with pytest.raises(ValueError, match="expected 1 rows from myself, got 2"):
        world.all_to_all(torch.zeros(2), [1, 1], [2, 2])
    world.barrier()  # refused before anything was sent: the group still works


@pytest.mark.parametrize("transport", ["tcp", "gloo"])
def test_impossible_parts_are_refused_and_harm_nothing(rank_pool, transport) -> None:
    pair = Topology(num_nodes=1, ranks_per_node=2)
    rank_pool.run(wrong_parts, pair, **TRANSPORTS[transport])


def test_alone_an_exchange_returns_what_was_passed() -> None:
    solo, part = SoloGroup(name="alone", rank=3), torch.arange(5, dtype=torch.uint8)
    assert solo.exchange([part], "dispatch")[0] is part
    pending = solo.start_exchange(([part] for _ in range(2)), "dispatch")
    assert torch.equal(pending.wait()[0], torch.cat([part, part]))
    assert pending.waits == [0.0]
    with pytest.raises(ValueError, match="expected 1 parts, one per member, got 2"):
        solo.exchange([part, part], "dispatch")


# -- failures ------------------------------------------------------------------------------------


def other_stage(groups: ParallelGroups) -> None:
    part = torch.ones(4, dtype=torch.uint8)
    groups.world.exchange([part] * 2, "dispatch" if groups.rank else "combine")


def other_size(groups: ParallelGroups) -> None:
    groups.world.all_gather(torch.ones(4 + groups.rank), [4 + groups.rank] * 2)


@pytest.mark.parametrize(
    ("fn", "texts"),
    [
        (other_stage, ("called dispatch while rank 0 called combine",
                       "called combine while rank 1 called dispatch")),
        (other_size, ("brings 20 bytes to all_gather but rank 0 expects 16",
                      "brings 16 bytes to all_gather but rank 1 expects 20")),
    ],
)  # fmt: skip
def test_members_that_disagree_are_told_how(rank_pool, fn, texts) -> None:
    outcomes = rank_pool.outcomes(fn, Topology(num_nodes=1, ranks_per_node=2), **TCP)
    assert all(isinstance(error, CommError) for error in outcomes)
    assert not any(isinstance(error, CommTimeout) for error in outcomes)
    assert any(text in str(error) for text in texts for error in outcomes)


def chunks_that_fail(groups: ParallelGroups):
    def chunks():
        yield [torch.ones(10, dtype=torch.uint8)] * 3
        if groups.rank == 2:
            raise KeyError("no second chunk")

    groups.world.start_exchange(chunks(), "dispatch").wait()


def test_chunks_that_fail_end_the_exchange_everywhere(rank_pool) -> None:
    outcomes = rank_pool.outcomes(chunks_that_fail, THREE, **TCP)
    assert isinstance(outcomes[2], KeyError)
    for error in outcomes[:2]:
        assert isinstance(error, CommError)
        assert not isinstance(error, CommTimeout)
        assert "aborted by rank 2" in str(error)


def half_an_exchange(groups: ParallelGroups, address: str):
    """Rank 2 sends its first chunk, and the second one never."""
    store, world = connect_store(address), groups.world
    part = torch.ones(1000, dtype=torch.uint8)

    def chunks():
        yield [part] * 3
        store.get("done/0")
        store.get("done/1")
        raise RuntimeError("over")

    groups.where.step, groups.where.layer = 12, 3
    if groups.rank == 2:
        with pytest.raises(RuntimeError, match="over"):
            world.start_exchange(chunks(), "dispatch")
        return None
    start = time.monotonic()
    with pytest.raises(CommTimeout) as caught:
        world.start_exchange([[part] * 3], "dispatch").wait()
    seconds = time.monotonic() - start
    with pytest.raises(CommError, match="unusable after a timeout in dispatch"):
        world.barrier()
    store.set(f"done/{groups.rank}", "1")
    return caught.value, seconds


def test_a_late_peer_is_named_with_what_had_come(rank_pool) -> None:
    store, address = host_store()
    answers = rank_pool.run(half_an_exchange, THREE, address, comm_timeout_s=DEADLINE_S, **TCP)
    for rank in (0, 1):
        error, seconds = answers[rank]
        assert (error.rank, error.silent, error.operation) == (rank, (2,), "dispatch")
        assert error.progress == {2: (1000, None)}
        assert str(error).startswith("step 12, layer 3, group 'world@")
        assert "rank 2 (received 1,000 bytes of an unannounced message)" in str(error)
        assert DEADLINE_S <= seconds < DEADLINE_S + SLACK_S
    del store


def send_to_stopped(groups: ParallelGroups) -> None:
    """Rank 2 stops until rank 0 has its error."""
    pids = groups.world.all_gather(torch.tensor([os.getpid()]), [1] * 3).tolist()
    groups.world.barrier()
    if groups.rank == 2:
        os.kill(os.getpid(), signal.SIGSTOP)
    try:
        groups.world.broadcast(torch.zeros(96 << 20, dtype=torch.uint8), 0)
        groups.world.barrier()  # where rank 1 learns it
    finally:
        if groups.rank == 0:
            os.kill(pids[2], signal.SIGCONT)


def test_the_deadline_covers_a_peer_that_takes_no_more(rank_pool) -> None:
    rank_pool.run(both_ways, THREE, 10)  # started, however busy the machine is
    outcomes = rank_pool.outcomes(send_to_stopped, THREE, comm_timeout_s=3.0, **TCP)
    assert all(isinstance(error, CommError) for error in outcomes)
    assert isinstance(outcomes[0], CommTimeout)
    assert (outcomes[0].operation, outcomes[0].silent) == ("broadcast", (2,))


def killed_in_flight(groups: ParallelGroups):
    """Rank 2 dies while megabytes are under way and the others are at something else."""
    world = groups.world
    part = torch.zeros(32 << 20, dtype=torch.uint8)
    world.barrier()
    if groups.rank == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    pending = world.start_exchange([[part] * 3], "dispatch")
    time.sleep(0.2)
    start = time.monotonic()
    with pytest.raises(CommError) as caught:
        pending.wait()
    return caught.value, time.monotonic() - start


def test_a_peer_killed_under_way_is_lost_at_once() -> None:
    with RankPool() as pool:
        outcomes = pool.outcomes(killed_in_flight, THREE, comm_timeout_s=60.0, **TCP)
    for error, seconds in outcomes[:2]:
        assert not isinstance(error, CommTimeout)
        assert "rank 2" in str(error)
        assert seconds < SLACK_S


def abort_under_way(groups: ParallelGroups):
    world = groups.world
    world.barrier()
    part = torch.zeros(1000, dtype=torch.uint8)
    if groups.rank == 2:
        time.sleep(0.3)
        groups.abort()
        return None
    if groups.rank == 1:
        threading.Timer(0.1, groups.abort).start()
    start = time.monotonic()
    with pytest.raises(CommError) as caught:
        world.exchange([part] * 3, "dispatch")
    with pytest.raises(CommError):
        world.barrier()
    return caught.value, time.monotonic() - start


def test_abort_wakes_own_and_other_waits(rank_pool) -> None:
    for error, seconds in rank_pool.run(abort_under_way, THREE, comm_timeout_s=60.0, **TCP)[:2]:
        assert not isinstance(error, CommTimeout)
        assert "aborted by rank" in str(error)
        assert seconds < SLACK_S


def wait_for_somebody_else(groups: ParallelGroups) -> None:
    """Rank 2 aborts while rank 0 waits for rank 1, which does not come either."""
    groups.world.barrier()
    if groups.rank == 2:
        groups.abort()
    elif groups.rank == 1:
        time.sleep(2.0)  # then its end of the connection closes
    else:
        groups.world.broadcast_bytes(None, 1)


def test_an_abort_ends_waits_for_others_too(rank_pool) -> None:
    outcomes = rank_pool.outcomes(wait_for_somebody_else, THREE, comm_timeout_s=60.0, **TCP)
    assert isinstance(outcomes[0], CommError)
    assert "lost rank 2" in str(outcomes[0])
    assert "aborted by rank 2" in str(outcomes[0])


def fds_and_old_threads(groups: ParallelGroups) -> tuple[int, list[str]]:
    """Open files now, and threads that moved bytes for the groups of an earlier run."""
    old = [thread.name for thread in threading.enumerate() if "expertmesh-tcp" in thread.name]
    both_ways(groups, 3 << 20)
    part = torch.zeros(3 << 20, dtype=torch.uint8)
    groups.world.start_exchange([[part] * 3], "dispatch").wait()
    assert any("expertmesh-tcp" in thread.name for thread in threading.enumerate())
    return len(os.listdir("/proc/self/fd")), old


def test_closed_groups_leave_no_sockets_and_no_threads(rank_pool) -> None:
    first = rank_pool.run(fds_and_old_threads, THREE, **TCP)
    for _ in range(3):
        last = rank_pool.run(fds_and_old_threads, THREE, **TCP)
    # Fewer is fine: what an earlier test of the pool left may be gone by now.
    assert all(now <= before for (now, _), (before, _) in zip(last, first, strict=True))
    assert all(old == [] for _, old in last)


# -- strangers -----------------------------------------------------------------------------------


def join(address: str, idx: int) -> TcpGroup:
    store = connect_store(address)
    diagnosis = Diagnosis(store, idx, Where())
    return TcpGroup(
        name="pair", ranks=(0, 1), rank=idx, store=store, diagnosis=diagnosis, timeout_s=20.0
    )


@settings(max_examples=10, deadline=None)
@given(garbage=st.binary(max_size=200))
def test_strangers_are_dropped_and_do_no_harm(garbage: bytes) -> None:
    store, address = host_store()
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(join, address, 0)
        host, port, _ = store.get("pair/0").decode().split()
        strangers = [socket.create_connection((host, int(port)), timeout=20.0) for _ in range(4)]
        strangers[0].sendall(garbage)
        strangers[1].sendall(os.urandom(20))  # as long as a member's greeting
        strangers[2].close()
        groups = [first, pool.submit(join, address, 1)]
        groups = [group.result() for group in groups]
        swaps = [
            pool.submit(group.exchange, [part_of(0, 0, i, j, 3000) for j in range(2)], "hello")
            for i, group in enumerate(groups)
        ]
        for i, swap in enumerate(swaps):
            assert torch.equal(swap.result()[1 - i], part_of(0, 0, 1 - i, i, 3000))
    for stranger in (strangers[0], strangers[1], strangers[3]):
        with stranger, suppress(ConnectionResetError):
            assert stranger.recv(1) == b""
    for group in groups:
        group.close()
    del store
