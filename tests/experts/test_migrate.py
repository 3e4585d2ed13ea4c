"""Migrations: whatever fails, a rank has one map and the weights that it names."""

import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import numpy as np
import pytest

from comms import transfer
from comms.transfer import TransferClient
from experts.migrate import MigrationError
from experts.supply import ExpertSupply
from router.placement import Placement
from tests.comms.faulty_proxy import Fault
from tests.experts.migrating import (
    EXPERT_BYTES,
    NUM_LAYERS,
    NUM_RANKS,
    World,
    left_over,
    random_row,
)

NUM_KILL_POINTS = 200
ANSWER_BYTES = 16 + 32 + 8  # what a server says before the first chunk
WAIT_S = 20.0


@pytest.fixture
def world() -> Iterator[World]:
    with World() as world:
        yield world


def swapped(placement: Placement, layer: int, a: int, b: int) -> list[int]:
    """The row of a layer with the experts of two slots exchanged."""
    row = placement.physical_to_logical[layer].tolist()
    row[a], row[b] = row[b], row[a]
    return row


def change(world: World, layer: int, row: list[int]) -> None:
    """All ranks prepare and flip."""
    epoch = world.placement.epoch + 1
    for rank in world.ranks:
        rank.migrator.prepare(epoch, layer, row, WAIT_S)
    for rank in world.ranks:
        rank.migrator.flip(epoch)
    world.placement = world.placement.with_layers({layer: row})


def test_thirty_migrations_move_what_the_plan_says(world):
    rng = np.random.default_rng(0)
    num_moves = Counter()
    for number in range(30):
        before, layer = world.placement, number % NUM_LAYERS
        change(world, layer, random_row(before, layer, rng))
        world.check()
        for move in world.placement.moves_from(before):
            rank = move.slot // before.slots_per_rank
            holders = np.flatnonzero(before.physical_to_logical[layer] == move.expert)
            nodes = holders // before.slots_per_rank // 2
            num_moves[rank, "node" if rank // 2 in nodes else "remote"] += 1
    assert num_moves.total() > 100
    in_force = NUM_LAYERS * world.placement.num_slots
    assert left_over().experts <= in_force + world.placement.num_slots  # and the last ones replaced
    for rank in world.ranks:
        metrics = rank.migrator.metrics()
        assert metrics["bytes"] == {
            "node": num_moves[rank.rank, "node"] * EXPERT_BYTES,
            "remote": num_moves[rank.rank, "remote"] * EXPERT_BYTES,
            "disk": 0,
        }
        assert metrics["prepared"] == metrics["flipped"] == 30
        assert metrics["retries"] == metrics["failed"] == metrics["abandoned"] == 0
        assert 0 < metrics["longest_flip_s"] <= metrics["flip_s"] < metrics["prepare_s"]


def test_what_is_in_force_is_not_touched_until_the_flip_and_then_changes_by_reference(world):
    rank = world.ranks[0]
    slots = rank.layers[0].slots
    before = [slots[slot] for slot in range(slots.num_slots)]
    contents = [bytes(weights.data) for weights in before]
    row = swapped(world.placement, 0, 0, 7)  # with a slot of rank 1
    rank.migrator.prepare(1, 0, row, WAIT_S)
    rank.check(world.placement)
    rank.migrator.flip(1)
    rank.check(world.placement.with_layers({0: row}))
    assert [slots[slot] is old for slot, old in enumerate(before)] == [False, True, True, True]
    assert [bytes(weights.data) for weights in before] == contents


def test_choices_are_prepared_for_the_map_that_comes_in_force(world):
    rank = world.ranks[0]
    rank.layers[0].choice = mock.Mock()
    rank.migrator.prepare(1, 0, swapped(world.placement, 0, 0, 7), WAIT_S)
    rank.migrator.flip(1)
    rank.layers[0].choice.prepare.assert_called_once_with(rank.layers[0].layer_placement)


def test_moves_within_a_rank_fetch_nothing(world):
    change(world, 1, swapped(world.placement, 1, 0, 1))
    world.check()
    assert all(rank.migrator.metrics()["experts"] == 0 for rank in world.ranks)


def test_slots_may_become_empty_and_be_filled_again(world):
    full = world.placement.physical_to_logical[0].tolist()
    row = [e if full.index(e) == slot else -1 for slot, e in enumerate(full)]  # first copies only
    assert row.count(-1) == 6
    change(world, 0, row)
    world.check()
    change(world, 0, full)
    world.check()


def test_epochs_come_one_by_one(world):
    migrator = world.ranks[1].migrator
    row, other = swapped(world.placement, 0, 0, 7), swapped(world.placement, 2, 0, 7)
    for epoch in (0, 2):
        with pytest.raises(MigrationError, match=f"rank 1 stands at epoch 0 .* prepare {epoch}"):
            migrator.prepare(epoch, 0, row, WAIT_S)
    with pytest.raises(
        MigrationError, match="stands at epoch 0 and cannot flip to 1, which is not"
    ):
        migrator.flip(1)
    assert not migrator.commit(1)
    assert not migrator.abandon(1)
    migrator.prepare(1, 0, row, WAIT_S)
    with pytest.raises(MigrationError, match="epoch 1 is prepared, or being prepared, already"):
        migrator.prepare(1, 2, other, WAIT_S)
    assert not migrator.abandon(2)
    assert migrator.abandon(1)
    with pytest.raises(MigrationError, match="cannot flip to 1"):
        migrator.flip(1)
    world.check()
    migrator.prepare(1, 2, other, WAIT_S)
    assert migrator.commit(1)
    with pytest.raises(MigrationError, match="committed already"):
        migrator.abandon(1)
    migrator.flip(1)
    world.ranks[1].check(world.placement.with_layers({2: other}))


def test_what_is_not_all_here_is_not_flipped_to_and_can_be_abandoned_until_the_end(world):
    migrator, row = world.ranks[0].migrator, swapped(world.placement, 0, 0, 7)
    get = ExpertSupply.get

    def meanwhile(supply, *args):
        weights = get(supply, *args)
        assert not migrator.commit(1)
        with pytest.raises(MigrationError, match="which is not prepared here"):
            migrator.flip(1)
        threading.Thread(target=migrator.abandon, args=[1]).start()
        assert args[-1].wait(WAIT_S)  # the last expert is here, and now it is called off
        return weights

    with (
        mock.patch.object(ExpertSupply, "get", meanwhile),
        pytest.raises(MigrationError, match="rank 0: epoch 1 was abandoned"),
    ):
        migrator.prepare(1, 0, row, WAIT_S)
    world.check()
    change(world, 0, row)
    world.check()


@pytest.mark.parametrize(
    ("layer", "row", "problem"),
    [
        (3, [0] * 16, r"layer\(3\) is outside \[0, 3\)"),
        (0, list(range(10)) + [10] * 6, "holds expert 10"),
        (0, [0] * 16, "no copy of experts"),
        (0, [0] * 3, "broadcast"),
    ],
)
def test_rows_that_are_no_placement_are_refused(world, layer, row, problem):
    with pytest.raises(ValueError, match=problem):
        world.ranks[0].migrator.prepare(1, layer, row, WAIT_S)
    world.check()
    change(world, 0, swapped(world.placement, 0, 0, 7))


def brought(world: World, slot: int, number: int = 8) -> list[int]:
    """Layer 0 with that expert in that slot, whose own one has another copy elsewhere.

    In the beginning rank 0 holds experts 0 1 5 6, rank 1: 2 3 4 7, rank 2: 5 6 0 1, rank 3: 7 8 9 2.
    """
    row = world.placement.physical_to_logical[0].tolist()
    row[slot] = number
    return row


def test_a_holder_that_fails_is_replaced_by_another_one_and_those_by_the_disk(world):
    change(world, 0, brought(world, 10))  # expert 8 is on ranks 2 and 3 now
    row, getter = brought(world, 1), world.ranks[0].migrator
    bytes_of = {"node": 0, "remote": 0, "disk": 0}
    for refusing, source in ((2, "remote"), (3, "disk")):
        world.ranks[refusing].proxy.refuses = True
        getter.prepare(2, 0, row, WAIT_S)
        bytes_of[source] += EXPERT_BYTES
        assert getter.metrics()["bytes"] == bytes_of
        getter.abandon(2)
    assert getter.metrics()["retries"] == 3
    world.ranks[0].disk_fails = True
    with pytest.raises(
        MigrationError,
        match=r"rank 0 cannot prepare epoch 2: expert 8 of expert layer 0 did not come: "
        r"rank 0 waited for rank 2 .*; rank 0 waited for rank 3 .*; the checkpoint: no disk",
    ):
        getter.prepare(2, 0, row, WAIT_S)
    world.check()


def test_a_holder_that_takes_all_the_time_leaves_some_for_the_next():
    with World(stall_s=60.0) as world:
        change(world, 0, brought(world, 10))
        world.ranks[0].disk_fails = True
        world.ranks[2].proxy.faults.append(Fault("stall", ANSWER_BYTES + 100))
        world.ranks[0].migrator.prepare(2, 0, brought(world, 1), 3.0)
        assert world.ranks[0].migrator.metrics()["bytes"]["remote"] == EXPERT_BYTES


def test_ranks_spread_over_holders_and_ask_their_own_node_first(world):
    change(world, 0, brought(world, 10))
    asked = []
    with mock.patch.object(TransferClient, "fetch", lambda self, *args, **_: asked.append(args[0])):
        for rank, slot in ((world.ranks[0], 1), (world.ranks[1], 4)):
            rank.disk_fails = True
            with pytest.raises(MigrationError, match="other bytes than the expert was loaded with"):
                rank.migrator.prepare(2, 0, brought(world, slot), WAIT_S)
        assert asked == [2, 3, 3, 2]
        asked.clear()
        with pytest.raises(MigrationError):  # 5 is on ranks 0 and 2
            world.ranks[1].migrator.prepare(2, 0, brought(world, 4, 5), WAIT_S)
        assert asked == [0, 2]


def test_wrong_weights_never_come_in_force(world):
    """The holder's own memory is damaged, so every checksum on the way is right."""
    getter = world.ranks[0]
    world.ranks[3].layers[0].slots[1].data[77] ^= 1
    getter.migrator.prepare(1, 0, brought(world, 0), WAIT_S)
    assert getter.migrator.metrics()["bytes"] == {"node": 0, "remote": 0, "disk": EXPERT_BYTES}
    getter.migrator.abandon(1)
    getter.disk_fails = True
    with pytest.raises(MigrationError, match="rank 3 sent other bytes than the expert was loaded"):
        getter.migrator.prepare(1, 0, brought(world, 0), WAIT_S)
    getter.check(world.placement)
    getter.disk_fails, getter.disk_holds = False, 9
    with pytest.raises(MigrationError, match="checkpoint holds other weights than it did"):
        getter.migrator.prepare(1, 0, brought(world, 0), WAIT_S)
    getter.check(world.placement)


@pytest.mark.parametrize("why", ["stall", "abandon"])
def test_a_stalled_holder_is_given_up_and_nothing_stays(why):
    with World(stall_s=1.0 if why == "stall" else 60.0) as world:
        row, getter = brought(world, 0), world.ranks[0]
        getter.disk_fails = True
        before = left_over()
        world.ranks[3].proxy.faults.append(Fault("stall", ANSWER_BYTES + 1 + 8))  # one byte comes
        if why == "abandon":
            threading.Timer(0.5, getter.migrator.abandon, [1]).start()
        reason = {"stall": r"1 of 1,536 bytes came\): nothing came for 1 s", "abandon": "called"}
        with pytest.raises(MigrationError, match=reason[why]):
            getter.migrator.prepare(1, 0, row, WAIT_S)
        deadline = time.monotonic() + 10
        while left_over() != before and time.monotonic() < deadline:
            time.sleep(0.01)  # the other side of the connection notices a moment later
        assert left_over() == before
        world.check()
        assert not getter.migrator.abandon(1)
        change(world, 0, row)
        world.check()


class Killed(BaseException):
    """Ends a fetching thread wherever it is."""


def killing(rank: int, chunk: int):
    """Rank's fetches die before their chunk of that number."""
    take_chunk, chunks = transfer._Fetch._take_chunk, iter(range(chunk))

    def patched(fetch: transfer._Fetch) -> None:
        if fetch._client.rank == rank and next(chunks, None) is None:
            raise Killed
        take_chunk(fetch)

    return mock.patch.object(transfer._Fetch, "_take_chunk", patched)


FAULTS = ("cut", "flip", "stall", "refuse", "thread", "abandon", "some flip", "none")


def test_two_hundred_kill_points_leave_the_old_or_the_new_never_a_mixture():
    rng = np.random.default_rng(1)
    outcomes = Counter()
    with World(stall_s=0.06) as world, ThreadPoolExecutor(NUM_RANKS) as pool:
        for number in range(NUM_KILL_POINTS):
            fault = FAULTS[number % len(FAULTS)]
            done = one_kill_point(world, pool, fault, rng)
            outcomes[fault, done] += 1
            world.check()
    by_end = Counter(done for (_, done), n in outcomes.items() for _ in range(n))
    assert by_end.total() == NUM_KILL_POINTS
    assert min(by_end[True], by_end[False]) > NUM_KILL_POINTS // 5
    assert all(outcomes[fault, True] for fault in FAULTS if fault not in ("abandon", "thread"))
    assert all(outcomes[fault, False] for fault in FAULTS if fault not in ("some flip", "none"))


def one_kill_point(world: World, pool: ThreadPoolExecutor, fault: str, rng) -> bool:
    """Try to change one layer; whether it came in force."""
    epoch, layer = world.placement.epoch + 1, int(rng.integers(NUM_LAYERS))
    row, victim = random_row(world.placement, layer, rng), world.ranks[rng.integers(NUM_RANKS)]
    for rank in world.ranks:
        rank.disk_fails = bool(rng.random() < 0.7)
        rank.proxy.refuses = fault == "refuse" and rank is victim
        rank.proxy.faults.clear()
        if fault in ("cut", "flip", "stall") and rng.random() < 0.7:
            after = int(rng.integers(ANSWER_BYTES + EXPERT_BYTES))
            rank.proxy.faults.extend([Fault(fault, after)] * int(rng.integers(1, 4)))
    dies_at = int(rng.integers(8)) if fault == "thread" else 1 << 30
    with killing(victim.rank, dies_at):
        futures = [pool.submit(r.migrator.prepare, epoch, layer, row, WAIT_S) for r in world.ranks]
        if fault == "abandon":
            time.sleep(rng.uniform(0, 0.015))
            for rank in world.ranks:
                rank.migrator.abandon(epoch)
        errors = [future.exception() for future in futures]
    assert all(e is None or isinstance(e, MigrationError | Killed) for e in errors), errors
    if fault == "abandon" or any(errors):
        for rank in world.ranks:
            rank.migrator.abandon(epoch)
        return False
    before, world.placement = world.placement, world.placement.with_layers({layer: row})
    first = NUM_RANKS if fault != "some flip" else int(rng.integers(NUM_RANKS))
    for rank in world.ranks[:first]:
        assert rank.migrator.commit(epoch)
        rank.migrator.flip(epoch)
    for rank in world.ranks:  # those that come after have the old one until they do
        rank.check(world.placement if rank.rank < first else before)
    for rank in world.ranks[first:]:
        rank.migrator.flip(epoch)
    return True
