"""Late, dead and aborting peers: every wait ends, and its error names who waited for whom."""

import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch

from comms.groups import CommError, CommTimeout, Group, ParallelGroups
from comms.launch import RankDied, RankError, RankPool, RankTimeout
from comms.store import connect_store, host_store
from comms.topology import Topology

THREE = Topology(num_nodes=1, ranks_per_node=3)
DEADLINE_S = 0.6
SLACK_S = 15.0  # notes take half a second (gloo: 0.9 s), unless the machine is starved
OPERATIONS = ("all_gather", "reduce_scatter", "all_reduce", "all_to_all", "broadcast",
              "broadcast_bytes", "barrier", "exchange", "start_exchange")  # fmt: skip
BACKENDS = {
    "shm": {},
    "tcp": {"node_backend": "gloo"},
    "gloo": {"node_backend": "gloo", "inter_node_backend": "gloo"},
}


def call(group: Group, operation: str) -> None:
    """One small collective; rank 2 is the source where there is one."""
    x, ones = torch.ones(3, 4), [1, 1, 1]
    parts = [torch.ones(5, dtype=torch.uint8)] * 3
    {
        "all_gather": lambda: group.all_gather(x[:1], ones),
        "reduce_scatter": lambda: group.reduce_scatter(x, ones),
        "all_reduce": lambda: group.all_reduce(x),
        "all_to_all": lambda: group.all_to_all(x, ones, ones),
        "broadcast": lambda: group.broadcast(x, 2),
        "broadcast_bytes": lambda: group.broadcast_bytes(None, 2),
        "barrier": lambda: group.barrier(),
        "exchange": lambda: group.exchange(parts, "exchange"),
        "start_exchange": lambda: group.start_exchange([parts], "start_exchange").wait(),
    }[operation]()


def error_of(group: Group, operation: str) -> tuple[CommError, float]:
    """The error of a call that must not go through, and the seconds it took to raise it."""
    start = time.monotonic()
    try:
        call(group, operation)
    except CommError as error:
        return error, time.monotonic() - start
    raise AssertionError(f"{operation} went through without rank 2")


def without_rank_2(groups: ParallelGroups, operation: str, address: str):
    """Rank 2 stays away until the others have their errors."""
    store = connect_store(address)
    groups.world.barrier()
    if groups.rank == 2:
        store.get("done/0")
        store.get("done/1")
        return None
    result = error_of(groups.world, operation)
    store.set(f"done/{groups.rank}", "1")
    return result


SILENT = [
    *(("shm", name) for name in OPERATIONS),
    *(("tcp", name) for name in OPERATIONS),
    *(("gloo", name) for name in ("all_to_all", "broadcast", "exchange")),
]


@pytest.mark.parametrize(("backend", "operation"), SILENT)
def test_a_silent_peer_is_named_after_the_deadline(rank_pool, backend, operation):
    store, address = host_store()
    answers = rank_pool.run(
        without_rank_2,
        THREE,
        operation,
        address,
        comm_timeout_s=DEADLINE_S,
        **BACKENDS[backend],
    )
    for rank in (0, 1):
        error, seconds = answers[rank]
        assert isinstance(error, CommTimeout)
        assert (error.rank, error.silent, error.operation) == (rank, (2,), operation)
        assert f"rank {rank} waited {DEADLINE_S:g} s in {operation} for rank 2" in str(error)
        assert DEADLINE_S <= seconds < DEADLINE_S + SLACK_S
    del store


def override_deadline(groups: ParallelGroups) -> tuple[bytes, float]:
    """The source comes after the group's deadline but within the call's."""
    start = time.monotonic()
    if groups.rank == 0:
        time.sleep(DEADLINE_S * 1.6)
    data = groups.world.broadcast_bytes(
        b"step" if groups.rank == 0 else None, 0, timeout_s=DEADLINE_S * 20
    )
    return data, time.monotonic() - start


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_call_may_wait_longer_than_its_group(rank_pool, backend):
    answers = rank_pool.run(
        override_deadline, THREE, comm_timeout_s=DEADLINE_S, **BACKENDS[backend]
    )
    assert all(data == b"step" and seconds > DEADLINE_S for data, seconds in answers)


def rank_2_dies(groups: ParallelGroups):
    groups.world.barrier()
    if groups.rank == 2:
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGKILL)
    return error_of(groups.world, "all_reduce")


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_killed_peer_is_reported_at_once(backend):
    with RankPool() as pool:
        outcomes = pool.outcomes(rank_2_dies, THREE, comm_timeout_s=60.0, **BACKENDS[backend])
    assert isinstance(outcomes[2], RankDied)
    assert "rank 2 died with exit code -9" in str(outcomes[2])
    for rank in (0, 1):
        error, seconds = outcomes[rank]
        assert not isinstance(error, CommTimeout)
        assert seconds < SLACK_S
        if backend == "shm":
            assert "lost rank 2 in all_reduce" in str(error)  # by itself or by its peer's note
            assert "the process is gone" in str(error)
        assert "rank 2" in str(error)


def abort_others(groups: ParallelGroups):
    groups.world.barrier()
    if groups.rank == 2:
        time.sleep(0.3)
        groups.abort()
        return None
    return error_of(groups.world, "broadcast_bytes")


@pytest.mark.parametrize("backend", BACKENDS)
def test_abort_wakes_the_peers(rank_pool, backend):
    answers = rank_pool.run(abort_others, THREE, comm_timeout_s=60.0, **BACKENDS[backend])
    for error, seconds in answers[:2]:
        assert not isinstance(error, CommTimeout)
        assert seconds < SLACK_S


def abort_own_wait(groups: ParallelGroups):
    groups.world.barrier()
    if groups.rank == 2:
        time.sleep(1.0)
        return None
    timer = threading.Timer(0.2, groups.world.abort)
    timer.start()
    first = error_of(groups.world, "barrier")
    return first, error_of(groups.world, "barrier")


@pytest.mark.parametrize("backend", BACKENDS)
def test_abort_wakes_the_own_wait_and_the_group_stays_unusable(rank_pool, backend):
    for answer in rank_pool.run(abort_own_wait, THREE, comm_timeout_s=60.0, **BACKENDS[backend])[
        :2
    ]:
        for error, seconds in answer:
            assert not isinstance(error, CommTimeout)
            assert seconds < SLACK_S


def raise_on_1(groups: ParallelGroups) -> None:
    if groups.rank == 1:
        raise KeyError("only here")
    groups.world.barrier()


def test_the_pool_names_the_rank_that_raised(rank_pool):
    with pytest.raises(RankError, match=r"rank 1 failed: KeyError\('only here'\)") as caught:
        rank_pool.run(raise_on_1, THREE)
    assert caught.value.rank == 1
    assert "in raise_on_1" in str(caught.value)


def hang_on_1(groups: ParallelGroups) -> None:
    if groups.rank == 1:
        time.sleep(600)
    groups.world.barrier()


def test_the_pool_kills_a_hang_shows_all_stacks_and_works_again():
    with RankPool() as pool:
        pool.run(pid_of, THREE)  # started, however busy the machine is
        with pytest.raises(RankTimeout) as caught:
            pool.run(hang_on_1, THREE, timeout_s=1.5)
        assert "in hang_on_1" in str(caught.value)
        assert "--- rank 0 ---" in str(caught.value)
        assert "_wait_slowly" in str(caught.value)  # where the others are
        assert pool.run(pid_of, THREE) == pool.pids


def pid_of(groups: ParallelGroups) -> int:
    return os.getpid()


def fds_of(groups: ParallelGroups) -> int:
    groups.world.all_reduce(torch.ones(100_000))
    return len(os.listdir("/proc/self/fd"))


def test_nothing_is_left_behind(rank_pool):
    before = set(os.listdir("/dev/shm"))
    rank_pool.run(fds_of, THREE)
    first = rank_pool.run(fds_of, THREE)
    for _ in range(5):
        last = rank_pool.run(fds_of, THREE)
    assert last == first
    assert {name for name in set(os.listdir("/dev/shm")) - before if "expertmesh" in name} == set()
    with RankPool() as pool:
        pids = pool.run(pid_of, THREE)
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
