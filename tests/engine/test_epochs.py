"""A placement comes in force on the same step everywhere, once all leaders were told, or not at all."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest

from cluster.engine.engine import HEARTBEAT_S, Follower, Leader, LockStepError
from cluster.engine.mailbox import Frame, LocalMailbox
from cluster.engine.sampling_params import SamplingParams
from cluster.offline import add_frame
from comms.groups import ParallelGroups
from tests.engine.model_free import FOUR, build_runner, leader_of
from tests.experts.migrating import first_placement

NUM_STEPS = 12
Mail = list[tuple[int, int, Any]]
"""(rank, step, epoch): a leader gets this frame in this step."""


class Recorder(LocalMailbox):
    """Keeps the epochs that a gateway would get, by step, and how long its leader would sleep."""

    def __init__(self, requests: list[Frame]) -> None:
        super().__init__(requests)
        self.step, self.sent, self.waits = 0, [], []

    def send(self, frame: Frame) -> None:
        self.sent.append((self.step, frame["stats"]["epoch"]))
        super().send(frame)

    def receive(self, timeout_s: float) -> list[Frame]:
        self.waits.append(timeout_s)
        return super().receive(timeout_s)


@dataclass(kw_only=True)
class Report:
    """Of one rank: epoch by step, and on leaders what was told the gateway, and waits by step."""

    epochs: list[int]
    sent: list[tuple[int, int]]
    waits: list[float]


def steps(groups: ParallelGroups, mail: Mail, works: bool, prepared: tuple[int, ...]) -> Report:
    runner, _ = build_runner(groups)
    mailbox = None
    if groups.topology.tp_rank_of(groups.rank) == 0:
        params = SamplingParams(temperature=0.0, max_tokens=99, ignore_eos=True)
        mailbox = Recorder([add_frame("r", [1, 2], params)] if works and groups.rank == 0 else [])
    engine = leader_of(groups, runner, mailbox) if mailbox else Follower(groups, runner)
    row = first_placement().physical_to_logical[0].tolist()
    row[0], row[7] = row[7], row[0]
    if groups.rank in prepared:
        runner.prepare(1, 0, row)
    groups.world.barrier()
    report = Report(epochs=[], sent=[], waits=[])
    for step in range(NUM_STEPS):
        if mailbox is not None:
            mailbox.step, report.sent, report.waits = step, mailbox.sent, mailbox.waits
            for rank, at, epoch in mail:
                if (rank, at) == (groups.rank, step):
                    mailbox.post({"type": "placement", "epoch": epoch})
        engine.step()
        report.epochs.append(runner.epoch)
    runner.close()
    return report


def run(pool, mail: Mail, works: bool, prepared=(0, 1, 2, 3)) -> list[Report]:
    return pool.run(steps, FOUR, mail, works, prepared, comm_timeout_s=10.0)


@pytest.mark.parametrize("works", [True, False])
@pytest.mark.parametrize("told", [(3, 3), (2, 6), (7, 1)])
def test_all_ranks_flip_in_the_step_in_which_the_last_leader_is_told(rank_pool, told, works):
    """Also in steps without work. Said twice it is the same, and the gateway hears of it at once."""
    mail = [(0, told[0], 1), (2, told[1], 1), (0, 9, 1), (2, 10, 1)]
    at = max(told)
    reports = run(rank_pool, mail, works)
    for report in reports:
        assert report.epochs == [0] * at + [1] * (NUM_STEPS - at)
        assert all(epoch == (step >= at) for step, epoch in report.sent)
    assert all((at, 1) in report.sent for report in reports[::2])


@pytest.mark.parametrize("epoch", [0, 2, 7, -1, None, "1", 1.0])
def test_frames_that_name_no_next_epoch_change_nothing(rank_pool, epoch):
    reports = run(rank_pool, [(0, 2, epoch), (2, 2, epoch)], works=True)
    assert [report.epochs for report in reports] == [[0] * NUM_STEPS] * 4


@pytest.mark.parametrize("prepared", [(), (0, 1), (1, 2, 3)])
def test_a_leader_that_is_not_prepared_holds_all_back(rank_pool, prepared):
    reports = run(rank_pool, [(0, 2, 1), (2, 2, 1)], works=True, prepared=prepared)
    assert [report.epochs for report in reports] == [[0] * NUM_STEPS] * 4


def disagree(groups: ParallelGroups) -> str:
    """Replica 0's ranks flip on their own."""
    runner, _ = build_runner(groups)
    is_leader = groups.topology.tp_rank_of(groups.rank) == 0
    engine = leader_of(groups, runner, LocalMailbox([])) if is_leader else None
    row = first_placement().physical_to_logical[0].tolist()
    row[0], row[1] = row[1], row[0]
    runner.prepare(1, 0, row)
    if groups.rank < 2:
        runner.flip(1)
    groups.world.barrier()
    said = ""
    if engine is not None:
        try:
            engine.step()
        except LockStepError as error:
            said = str(error)
    runner.close()
    return said


def test_replicas_at_different_epochs_do_not_compute(rank_pool):
    said = "replicas stand at different placement epochs: [0, 1]"
    assert rank_pool.run(disagree, FOUR) == [said, "", said, ""]


PROMPT = list(range(40))


def cached_tokens(groups: ParallelGroups, forgets: bool, ahead: bool) -> list[int]:
    """Of requests with one prompt, on leaders: before any, then with a placement told of but not in
    force at the other replica, then with it in force, and again."""
    runner, _ = build_runner(groups)
    params = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)
    row = first_placement().physical_to_logical[0].tolist()
    row[0], row[7] = row[7], row[0]
    runner.prepare(1, 0, row)
    groups.world.barrier()
    if groups.topology.tp_rank_of(groups.rank):
        engine: Leader | Follower = Follower(groups, runner)
        while engine.step():
            pass
        runner.close()
        return []
    told = {2: 15, 0: 25}[groups.rank]
    mailbox = LocalMailbox([add_frame(name, PROMPT, params) for name in "abcd"])
    requests = {10 * number: mailbox._unread.popleft() for number in range(4)}
    with ThreadPoolExecutor(1) as executor:
        options = {"executor": executor if ahead else None, "forgets_at_flip": forgets}
        engine, step = leader_of(groups, runner, mailbox, **options), -1
        while engine.step():
            step += 1
            if step in requests:
                mailbox.post(requests[step])
            if step == told:
                mailbox.post({"type": "placement", "epoch": 1})
    runner.close()
    return [event.cached_tokens for event in mailbox.events if event.token_id is not None]


@pytest.mark.parametrize("ahead", [False, True])
def test_what_the_old_placement_computed_is_not_found_where_the_new_would_compute_otherwise(
    rank_pool, ahead
):
    """Replica 1 is told before its third request comes, replica 0 after it; the fourth comes later."""
    reports = rank_pool.run(cached_tokens, FOUR, True, ahead, comm_timeout_s=10.0)
    assert reports[0] == [0, 32, 32, 0]
    assert reports[2] == [0, 32, 0, 0]
    reports = rank_pool.run(cached_tokens, FOUR, False, ahead, comm_timeout_s=10.0)
    assert reports[0] == reports[2] == [0, 32, 32, 32]


def test_a_leader_that_was_told_does_not_sleep_until_the_others_are(rank_pool):
    """With nothing to do, from the second step on leaders sleep in their mailboxes."""
    reports = run(rank_pool, [(0, 3, 1), (2, 6, 1)], works=False)
    awake = range(4, 7)
    waits = [0.0 if step == 0 or step in awake else HEARTBEAT_S for step in range(NUM_STEPS)]
    assert reports[0].waits == waits
    assert reports[2].waits == [0.0] + [HEARTBEAT_S] * (NUM_STEPS - 1)
