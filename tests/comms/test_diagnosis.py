"""Errors name who started it: chains of waits, late and dead ranks, and a store out of reach."""

import os
import pickle
import re
import signal
import time
from collections.abc import Iterator
from contextlib import suppress

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from comms.blame import Note, because, unheard
from comms.diagnosis import Diagnosis
from comms.groups import CommError, CommTimeout, Group, ParallelGroups
from comms.launch import RankDied, RankPool
from comms.store import connect_store, host_store
from comms.topology import Topology
from comms.where import Where

DEADLINE_S = 1.0
LATEST_S = DEADLINE_S + 1.0  # after the call, on every rank
TWO = Topology(num_nodes=1, ranks_per_node=2)
FOUR = Topology(num_nodes=2, ranks_per_node=2)  # nodes (0, 1) and (2, 3), rails (0, 2) and (1, 3)


def timed_error(group: Group, stage: str = "dispatch") -> tuple[CommError, float]:
    """The error of an exchange that must not go through, and the seconds it took."""
    start = time.monotonic()
    try:
        group.exchange([torch.ones(9, dtype=torch.uint8)] * group.size, stage)
    except CommError as error:
        return error, time.monotonic() - start
    raise AssertionError("the exchange went through")


@pytest.fixture
def address() -> Iterator[str]:
    store, text = host_store()
    yield text
    del store


# -- chains of waits ---------------------------------------------------------------------------


def wait_in_a_chain(groups: ParallelGroups, address: str):
    """Rank 2 waits for 0, 0 waits for 1, 1 waits for 3, which sleeps until all have their errors."""
    store = connect_store(address)
    groups.world.barrier()
    if groups.rank == 3:
        store.wait([f"done/{rank}" for rank in range(3)])
        return None
    groups.where.step, groups.where.layer = 7, groups.rank
    group = {2: groups.rail, 0: groups.node, 1: groups.rail}[groups.rank]
    result = timed_error(group, f"stage {groups.rank}")
    store.set(f"done/{groups.rank}", "1")
    return result


@pytest.mark.parametrize("inter_node", ["tcp", "gloo"])
def test_every_error_names_the_end_of_the_chain(rank_pool, address, inter_node) -> None:
    answers = rank_pool.run(
        wait_in_a_chain, FOUR, address,
        comm_timeout_s=DEADLINE_S, inter_node_backend=inter_node,
    )  # fmt: skip
    for rank, (silent, links) in enumerate([((1,), [1]), ((3,), []), ((0,), [0, 1])]):
        error, seconds = answers[rank]
        assert isinstance(error, CommTimeout)
        assert error.silent == silent
        assert error.where == f"step 7, layer {rank}"
        assert str(error).startswith(f"step 7, layer {rank}, group ")
        for link in links:
            needed = {0: 1, 1: 3}[link]
            assert f"rank {link} waited for rank {needed} in stage {link} of" in error.because
            assert f"(step 7, layer {link})" in error.because
        assert error.because.endswith("rank 3 never answered") == bool(links)
        assert seconds < LATEST_S


def wait_for_each_other(groups: ParallelGroups):
    """Rank 0 is in one group, rank 1 in another."""
    groups.world.barrier()
    return timed_error([groups.node, groups.tp][groups.rank], f"stage {groups.rank}")


def test_ranks_that_wait_for_each_other_are_told_so(rank_pool) -> None:
    topology = Topology(num_nodes=1, ranks_per_node=2, tensor_parallel_size=2)
    for rank, (error, seconds) in enumerate(
        rank_pool.run(wait_for_each_other, topology, comm_timeout_s=DEADLINE_S)
    ):
        other = 1 - rank
        assert f"rank {other} waited for rank {rank} in stage {other} of" in error.because
        assert error.because.endswith("rank 0, rank 1 wait for each other")
        assert seconds < LATEST_S


def abort_for_rank_3(groups: ParallelGroups):
    """Rank 3 is late for a barrier with rank 2, which gives up and aborts what all others are in."""
    groups.world.barrier()
    if groups.rank == 3:
        time.sleep(2.5)
    elif groups.rank == 2:
        with pytest.raises(CommTimeout):
            groups.tp.barrier(timeout_s=0.5)
        groups.abort()
        return None
    return timed_error(groups.world)


@pytest.mark.parametrize("nodes", [1, 2])
def test_who_saw_an_abort_learns_what_it_was_for(rank_pool, nodes) -> None:
    topology = Topology(num_nodes=nodes, ranks_per_node=4 // nodes, tensor_parallel_size=2)
    answers = rank_pool.run(abort_for_rank_3, topology, comm_timeout_s=60.0)
    for rank, end in ((0, "rank 3 never answered"), (1, "rank 3 never answered"),
                      (3, "rank 3 came late")):  # fmt: skip
        error, seconds = answers[rank]
        assert not isinstance(error, CommTimeout)
        assert "rank 2 waited for rank 3 in barrier of" in str(error)
        assert str(error).endswith(end)
        assert seconds < 0.5 + LATEST_S


# -- stopped and dead ranks --------------------------------------------------------------------


def stop_rank_1(groups: ParallelGroups, address: str):
    """Rank 1 is stopped in its stage until the other has its error, and then goes on."""
    store = connect_store(address)
    groups.world.barrier()
    if groups.rank == 1:
        store.set("pid", str(os.getpid()))
        os.kill(os.getpid(), signal.SIGSTOP)
        with suppress(AssertionError):  # in shared memory lies what rank 0 left for this stage
            return timed_error(groups.world)
        return timed_error(groups.world)
    error = timed_error(groups.world)
    groups.abort()
    os.kill(int(store.get("pid")), signal.SIGCONT)
    return error


@pytest.mark.parametrize("node_backend", ["shm", "gloo"])
def test_a_stopped_rank_is_named_and_learns_that_it_was_late(
    rank_pool, address, node_backend
) -> None:
    (error, seconds), (late, _) = rank_pool.run(
        stop_rank_1, TWO, address, comm_timeout_s=DEADLINE_S, node_backend=node_backend
    )
    assert isinstance(error, CommTimeout)
    assert error.silent == (1,)
    assert error.progress == {1: (0, None)}
    assert "for rank 1 (received 0 bytes of an unannounced message)" in str(error)
    assert seconds < LATEST_S
    assert str(late).endswith("rank 1 came late")


def die_in_a_rail(groups: ParallelGroups):
    """Rank 3 dies while rank 1 waits for it, and rank 0 for rank 1."""
    groups.world.barrier()
    if groups.rank == 3:
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGKILL)
    if groups.rank == 2:
        return None
    result = timed_error([groups.node, groups.rail][groups.rank], f"stage {groups.rank}")
    groups.abort()
    return result


def test_a_dead_rank_is_named_by_those_who_never_spoke_to_it() -> None:
    with RankPool(4) as pool:
        outcomes = pool.outcomes(die_in_a_rail, FOUR, comm_timeout_s=20.0)
    assert isinstance(outcomes[3], RankDied)
    for rank in (0, 1):
        error, seconds = outcomes[rank]
        assert "rank 1 lost rank 3 in stage 1" in str(error)
        assert seconds < 0.2 + LATEST_S


# -- a store out of reach ----------------------------------------------------------------------


def outlive_the_store(groups: ParallelGroups, address: str, fate: str, node_backend: str):
    """Rank 0 waits for rank 1, which stays away; rank 2 hosted the store, which answers no more."""
    meeting, answers = connect_store(address), None
    if groups.rank == 2:
        store, mine = host_store()
        meeting.set("pid", str(os.getpid()))
        meeting.set("address", mine)
        meeting.get("connected")
        if fate == "stopped":
            os.kill(os.getpid(), signal.SIGSTOP)
        del store
    else:
        store = connect_store(meeting.get("address").decode())
        mine = ParallelGroups.connect(
            TWO, groups.rank, store, node_backend=node_backend, timeout_s=DEADLINE_S
        )
        mine.world.barrier()
        if groups.rank == 0:
            meeting.set("connected", "1")
            time.sleep(0.2)
            answers = timed_error(mine.world), timed_error(mine.node)
            os.kill(int(meeting.get("pid")), signal.SIGCONT)
    groups.world.barrier()
    return answers


@pytest.mark.parametrize("fate", ["gone", "stopped"])
@pytest.mark.parametrize("node_backend", ["shm", "gloo"])
def test_without_the_store_errors_come_in_time_and_say_what_is_known(
    rank_pool, address, fate, node_backend
) -> None:
    three = Topology(num_nodes=1, ranks_per_node=3)
    for error, seconds in rank_pool.run(outlive_the_store, three, address, fate, node_backend)[0]:
        assert isinstance(error, CommTimeout)
        assert (error.silent, error.because) == ((1,), "")
        assert seconds < LATEST_S


# -- the notes themselves ----------------------------------------------------------------------


def late(rank: int, needs: list[int]) -> Note:
    return Note(text=f"rank {rank} waited", needs=tuple(needs), late=True)


@given(st.lists(st.lists(st.integers(0, 7), max_size=3), min_size=8, max_size=8))
def test_those_who_never_answered_are_all_that_can_be_reached_without_a_note(edges) -> None:
    """Against reachability by powers of the adjacency matrix; edges go to higher ranks only."""
    edges = [[need for need in needs if need > rank] for rank, needs in enumerate(edges)]
    notes = {rank: late(rank, needs) for rank, needs in enumerate(edges) if needs}
    direct = np.array([[need in needs for need in range(8)] for needs in edges], dtype=int)
    reached = sum(np.linalg.matrix_power(direct, n) for n in range(1, 9)).astype(bool)
    for me, mine in notes.items():
        text = because(mine, me, notes)
        told = [rank for rank in range(8) if reached[me, rank] and rank in notes]
        silent = [rank for rank in range(8) if reached[me, rank] and rank not in notes]
        assert sorted(unheard(mine, notes)) == silent
        if not told:
            assert text == ""
            continue
        *sentences, end = text.split("; ")
        assert sorted(sentences) == [notes[rank].text for rank in told]
        assert {int(rank) for rank in re.findall(r"rank (\d)", end)} == set(silent)
        assert end.endswith(" never answered")


def test_only_those_who_may_still_write_are_waited_for() -> None:
    aborted = Note(text="rank 0 lost rank 1: aborted", needs=(1,))
    assert unheard(aborted, {}) == [1]
    assert unheard(aborted, {1: late(1, [2])}) == []  # rank 1 has waited for rank 2's note itself
    dead = Note(text="rank 0 lost rank 1: the process is gone", needs=(1,), ended=True)
    assert unheard(dead, {}) == []


def test_all_notes_of_a_chain_are_read_at_once(address) -> None:
    store = connect_store(address)
    for rank in (1, 2, 3):
        store.set(f"note/{rank}", late(rank, [rank + 1]).pack())
    diagnosis = Diagnosis(store, 0, Where())
    error = diagnosis.lost(group="node", operation="combine", peers=[1], reason="it hung up")
    told = "rank 1 waited; rank 2 waited; rank 3 waited; rank 4 never answered"
    assert str(error) == f"group 'node': rank 0 lost rank 1 in combine: it hung up; {told}"
    note = Note.unpack(store.get("note/0"))
    assert (note.needs, note.late, note.ended) == ((1,), False, False)


def test_errors_keep_their_fields_when_pickled() -> None:
    error = CommTimeout(
        group="rail", operation="dispatch/rail", rank=1, silent=[3], deadline_s=2.0,
        where="step 3", progress={3: (5, 1000)}, because="rank 3 waited for rank 4",
    )  # fmt: skip
    again = pickle.loads(pickle.dumps(error))
    assert vars(again) == vars(error)
    assert (
        str(again)
        == str(error)
        == (
            "step 3, group 'rail': rank 1 waited 2 s in dispatch/rail for rank 3 "
            "(received 5 bytes of 1,000); rank 3 waited for rank 4"
        )
    )
