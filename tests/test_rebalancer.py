"""When experts move, and that nothing which goes wrong moves or hides anything."""

import asyncio
import time
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from cluster import draft_aside as draft_aside_module
from cluster import rebalancer as rebalancer_module
from cluster.config import EplbConfig
from cluster.rebalancer import ExpertFacts, Rebalancer
from cluster.server.errors import RequestError
from router.load import ExpertLoad
from router.load_files import read_window
from router.placement import Placement
from tests.fake_ranks import cluster, placement

INTERVAL_S = 0.01
FACTS = ExpertFacts(model_layers=(3, 5), experts_per_token=2, expert_bytes=1000)
# Experts 6 and 7 are on the last rank only, which therefore gets half of everything.
SKEWED = np.array([20, 20, 20, 20, 40, 40, 80, 80])
EVEN = np.full(8, 40)


class Cluster:
    """A rebalancer over fakes, with traffic: every rank routes `counts_E` every interval."""

    def __init__(self, at=None, **options):
        self.ranks, self.leaders = cluster(at)
        self.counts_E = SKEWED
        config = {"enabled": True, "interval_s": INTERVAL_S, "prepare_timeout_s": 0.05, **options}
        self.rebalancer = Rebalancer(
            EplbConfig(**config), FACTS, self.ranks[0].at, self.ranks, self.leaders
        )

    @property
    def counters(self):
        return self.rebalancer.counters

    @property
    def at(self):
        return self.ranks[0].at

    async def traffic(self):
        while True:
            for rank in self.ranks:
                rank.routed_LE = rank.routed_LE + self.counts_E
                rank.served_L = rank.served_L + self.counts_E.sum()
            await asyncio.sleep(INTERVAL_S)

    async def until(self, happened, timeout_s=5.0):
        deadline = time.monotonic() + timeout_s
        while not happened():
            assert time.monotonic() < deadline, f"never happened: {self.counters}"
            await asyncio.sleep(0.002)

    async def recorded(self, tokens=2000):
        await self.until(lambda: self.rebalancer.loads.num_tokens > tokens)

    def run(self, scenario):
        async def whole():
            traffic = asyncio.create_task(self.traffic())
            self.rebalancer.start()
            try:
                await scenario()
            finally:
                await self.rebalancer.stop()
                traffic.cancel()

        asyncio.run(asyncio.wait_for(whole(), 20))


def test_a_skewed_load_is_put_right_layer_by_layer():
    case = Cluster()
    before = case.at

    async def scenario():
        await case.until(lambda: case.counters.finished)
        await asyncio.sleep(5 * INTERVAL_S)

    case.run(scenario)
    assert (case.counters.started, case.counters.finished, case.counters.abandoned) == (1, 1, 0)
    assert case.leaders.committed == [1, 2], "one epoch for each layer"
    assert case.rebalancer.placement.epoch == 2
    assert case.counters.moves == len(case.at.moves_from(before)) > 0
    assert "2 of 2 layers above 1.050" in case.counters.last_reason
    planned = asyncio.run(case.rebalancer.planned_balancedness())
    assert min(planned) >= 1 / 1.02
    assert 0 < case.counters.seconds < 5


def test_only_layers_that_the_policy_names_are_touched(monkeypatch):
    case = Cluster()
    decide = case.rebalancer._policy.decide

    def only_second(window, at):
        decision = decide(window, at)
        return replace(
            decision, layers=(1,) if 1 in decision.layers else (), rebalance=at.epoch < 1
        )

    async def scenario():
        monkeypatch.setattr(case.rebalancer._policy, "decide", only_second)
        await case.until(lambda: case.counters.finished)
        await asyncio.sleep(5 * INTERVAL_S)

    before = case.at
    case.run(scenario)
    changed = (case.at.physical_to_logical != before.physical_to_logical).any(axis=1)
    assert changed.tolist() == [False, True]


def test_moves_that_do_not_pay_are_not_made(monkeypatch):
    case = Cluster()
    asked = []

    def pays(before, after, moves, num_layers, num_ranks):
        asked.append((before, after, moves, num_layers, num_ranks))
        return False

    async def scenario():
        monkeypatch.setattr(case.rebalancer._policy, "pays", pays)
        decide = type(case.rebalancer._policy)(case.rebalancer._policy.options).decide
        monkeypatch.setattr(case.rebalancer._policy, "decide", decide)
        await case.until(lambda: "no plan pays for its moves" in case.rebalancer.state)

    case.run(scenario)
    assert case.counters.started == 0
    before, after, moves, num_layers, num_ranks = asked[0]
    assert before == pytest.approx(2.0)
    assert (after <= 1.02, moves > 0, num_layers, num_ranks) == (True, True, 2, 4)


def test_an_even_load_moves_nothing():
    case = Cluster(placement(redundant=0))
    case.counts_E = EVEN

    async def scenario():
        assert case.rebalancer.state == "on: not enough load recorded yet"
        await case.recorded(20_000)
        assert case.rebalancer.state.startswith("on: balanced: layer 0 is worst with 1.000")

    case.run(scenario)
    assert (case.counters.started, case.at.epoch) == (0, 0)


def test_switched_off_it_records_and_moves_nothing():
    case = Cluster(enabled=False)

    async def scenario():
        await case.recorded(20_000)
        assert case.rebalancer.state == "off: eplb_config.enabled is false"

    case.run(scenario)
    assert (case.counters.started, case.at.epoch) == (0, 0)


def test_a_dry_run_shows_the_effect_and_changes_nothing():
    case = Cluster(enabled=False)

    async def scenario():
        await case.recorded()
        outcome = await case.rebalancer.rebalance(dry_run=True)
        assert not outcome.started
        assert not case.rebalancer.running
        for effect in outcome.draft.effects:
            assert effect.imbalance_before > 1.05 > 1.02 >= effect.imbalance_after
            assert effect.imbalance_after >= effect.lower_bound >= 1
            assert effect.moves > 0
            assert effect.reason

    case.run(scenario)
    assert (case.counters.started, case.at.epoch, case.leaders.committed) == (0, 0, [])
    assert all(rank.prepared is None for rank in case.ranks)


def test_an_operator_can_ask_and_a_second_one_must_wait():
    case = Cluster(enabled=False)

    async def scenario():
        await case.recorded()
        case.ranks[1].behaviour = "hangs"
        asked = [case.rebalancer.rebalance() for _ in range(2)]
        answers = await asyncio.gather(*asked, return_exceptions=True)
        assert answers[0].started
        assert "FAILED_PRECONDITION: a rebalance is running" in str(answers[1])
        with pytest.raises(RequestError, match=r"layer [35] .1 of 2., experts to move: ."):
            await case.rebalancer.rebalance()
        assert not (await case.rebalancer.rebalance(dry_run=True)).started
        await case.until(lambda: case.counters.abandoned)
        case.ranks[1].behaviour = "works"
        assert (await case.rebalancer.rebalance()).started
        await case.until(lambda: case.counters.finished)

    case.run(scenario)
    assert case.counters.started == 2
    assert case.counters.last_reason == "asked for by an operator"


def test_from_scratch_is_planned_without_regard_to_what_is_there():
    case = Cluster(enabled=False)
    case.counts_E = EVEN

    async def scenario():
        await case.recorded()
        assert not (await case.rebalancer.rebalance(dry_run=True)).draft.rows
        anew = await case.rebalancer.rebalance(from_scratch=True)
        assert anew.draft.num_moves > 0
        await case.until(lambda: case.counters.finished)

    case.run(scenario)
    assert case.counters.moves == len(case.at.moves_from(placement()))


def test_the_automatic_one_waits_for_the_operators():
    case = Cluster(prepare_timeout_s=1.0)
    case.counts_E = EVEN

    async def scenario():
        await case.recorded()
        case.ranks[0].behaviour = "hangs"
        assert (await case.rebalancer.rebalance(from_scratch=True)).started
        case.counts_E = SKEWED
        await asyncio.sleep(20 * INTERVAL_S)
        assert case.counters.started == 1

    case.run(scenario)


@pytest.mark.parametrize("behaviour", ["fails", "hangs", "prepares and then hangs"])
def test_what_fails_is_counted_explained_and_tried_again_later(behaviour):
    case = Cluster()
    before = case.at

    async def scenario():
        case.ranks[2].behaviour = behaviour
        await case.until(lambda: case.counters.abandoned)
        assert case.rebalancer.placement is before
        assert case.at is before
        assert case.leaders.committed == []
        assert "rank 2 has not prepared epoch 1" in case.counters.last_error
        await case.until(lambda: case.counters.abandoned == 3)
        case.ranks[2].behaviour = "works"
        await case.until(lambda: case.counters.finished)

    case.run(scenario)
    assert case.counters.started == 4
    assert (case.counters.failures, case.counters.doing) == (0, "")
    assert case.at.epoch == 2


def test_pauses_are_told_and_end():
    case = Cluster(interval_s=50.0)

    async def scenario():
        case.counters.fail("a reason")
        case.counters.fail("a reason")
        assert case.rebalancer.state == "on, pausing 200 s after failure 2 in a row"
        case.counters.failed_at -= 201
        assert case.rebalancer.state == "on: not enough load recorded yet"
        for _ in range(2000):
            case.counters.fail("a reason")
        assert "pausing 300 s" in case.rebalancer.state

    case.run(scenario)


def test_pauses_double_with_each_failure():
    case = Cluster()
    starts = []

    async def scenario():
        case.ranks[2].behaviour = "fails"
        for number in range(1, 6):
            await case.until(lambda number=number: case.counters.abandoned == number)
            starts.append(time.monotonic())

    case.run(scenario)
    # The n-th pause is at least interval * 2^n; how much longer is the machine's affair.
    for number, (one, other) in enumerate(pairwise(starts), 1):
        assert other - one >= INTERVAL_S * 2**number * 0.9


def test_layers_that_were_changed_before_a_failure_stay():
    case = Cluster()

    async def scenario():
        await case.until(lambda: case.at.epoch == 1)
        case.ranks[0].behaviour = "fails"
        await case.until(lambda: case.counters.abandoned)

    case.ranks[0].behaviour = "works"
    case.run(scenario)
    assert case.rebalancer.placement.epoch == case.at.epoch == 1
    assert (case.rebalancer.placement.physical_to_logical == case.at.physical_to_logical).all()


def test_a_late_commit_is_adopted_when_it_is_reported():
    case = Cluster()
    case.leaders.stuck = True

    async def scenario():
        await case.until(lambda: case.counters.abandoned)
        assert "epoch 1 was committed, but replica 0, 1" in case.counters.last_error
        assert case.rebalancer.placement.epoch == 0
        case.leaders.stuck = False
        case.leaders.flip()
        await case.until(lambda: case.counters.finished)

    case.run(scenario)
    assert case.rebalancer.placement.epoch == case.at.epoch == 2


def test_a_rank_that_does_not_report_is_named_and_does_not_end_the_watch():
    case = Cluster(enabled=False)

    async def scenario():
        await case.recorded()
        case.ranks[3].stats_error = ConnectionError("gone")
        await case.until(lambda: "rank 3 has not reported" in case.counters.last_error)
        looked = case.rebalancer.loads.record.last
        case.ranks[3].stats_error = None
        await case.until(lambda: case.rebalancer.loads.record.last is not looked)

    case.run(scenario)


def test_an_error_of_our_own_is_shown_and_does_not_end_the_watch(monkeypatch):
    case = Cluster()

    async def scenario():
        monkeypatch.setattr(case.rebalancer._policy, "decide", lambda *_: 1 / 0)
        await case.until(lambda: "ZeroDivisionError" in case.counters.last_error)
        looked = case.rebalancer.loads.record.last
        await case.until(lambda: case.rebalancer.loads.record.last is not looked)
        monkeypatch.undo()
        await case.until(lambda: case.counters.finished)

    case.run(scenario)


@pytest.mark.parametrize("why", ["breaks", "hangs"])
def test_a_plan_that_is_not_made_is_told_and_tried_again(why, monkeypatch):
    monkeypatch.setattr(rebalancer_module, "PLAN_TIMEOUT_S", 0.02)
    case = Cluster()
    make_draft = case.rebalancer._make_draft

    async def no_draft(*_, **__):
        if why == "hangs":
            await asyncio.sleep(3600)
        raise ValueError("no such shape")

    async def scenario():
        case.rebalancer._make_draft = no_draft
        told = {"breaks": "ValueError: no such shape", "hangs": "no plan was made within 0.02 s"}
        await case.until(lambda: told[why] in case.counters.last_error)
        with pytest.raises(
            (ValueError, RequestError), match=told[why].removeprefix("ValueError: ")
        ):
            await case.rebalancer.rebalance()
        monkeypatch.undo()
        case.rebalancer._make_draft = make_draft
        await case.until(lambda: case.counters.finished)

    case.run(scenario)


def test_the_watch_goes_on_while_a_plan_is_made():
    case = Cluster()
    asked = []

    async def slow_draft(*_, **__):
        asked.append(time.monotonic())
        await asyncio.sleep(3600)

    async def scenario():
        case.rebalancer._make_draft = slow_draft
        await case.until(lambda: asked)
        looks = {id(case.rebalancer.loads.record.last): case.rebalancer.loads.record.last}
        while len(looks) < 4:
            await asyncio.sleep(0.005)
            looks[id(case.rebalancer.loads.record.last)] = case.rebalancer.loads.record.last
        assert len(asked) == 1, "one plan at a time"

    case.run(scenario)


def test_large_plans_are_made_by_ray_and_small_ones_here(monkeypatch):
    """The same function either way; what Ray does with it is Ray's."""
    calls = []

    class Task:
        def options(self, **options):
            calls.append(options)
            return self

        async def remote(self, *args, **options):
            return self.function(*args, **options)

    def remote(function):
        task = Task()
        task.function = function
        return task

    monkeypatch.setattr(draft_aside_module.ray, "remote", remote)
    load = ExpertLoad(mean_LE=np.tile(SKEWED, (2, 1)).astype(float))
    small = asyncio.run(draft_aside_module.draft_aside(load, placement(), target=1.02))
    assert calls == []
    monkeypatch.setattr(draft_aside_module, "SMALL", 23)
    large = asyncio.run(draft_aside_module.draft_aside(load, placement(), target=1.02))
    assert calls == [{"num_cpus": 0, "max_retries": 0}]
    assert small.effects == large.effects
    assert small.num_moves > 0


def test_a_watch_that_ended_says_so():
    case = Cluster()

    async def scenario():
        case.rebalancer._watching.cancel()
        await case.until(lambda: "the watch ended unasked" in case.rebalancer.state)
        assert case.counters.last_error == "the watch ended: cancelled"

    case.run(scenario)


def test_stopping_does_not_wait_for_a_rank_that_hangs():
    case = Cluster(prepare_timeout_s=60.0)
    case.ranks[1].behaviour = "hangs"
    started = []

    async def scenario():
        await case.until(lambda: case.counters.started)
        started.append(time.monotonic())
        await case.rebalancer.stop()
        assert not case.rebalancer.running

    case.run(scenario)
    assert time.monotonic() - started[0] < 5


def test_refusals_say_what_is_missing():
    case = Cluster(enabled=False, min_tokens=1 << 20)

    async def scenario():
        await case.recorded(100)
        with pytest.raises(
            RequestError, match=r"not enough load .* of eplb_config.min_tokens = 1048576"
        ):
            await case.rebalancer.rebalance(dry_run=True)

    case.run(scenario)
    alone = Cluster(Placement.contiguous(2, 8, 1), enabled=False)
    with pytest.raises(RequestError, match="one rank only"):
        asyncio.run(alone.rebalancer.rebalance(dry_run=True))


def test_the_record_can_be_taken_out_and_read_again(tmp_path):
    case = Cluster(enabled=False)
    for rank in case.ranks:
        rank.rows_LMK = np.tile(np.array([[[0, 7], [1, 2]]]), (2, 1, 1))

    async def scenario():
        await case.recorded()

    case.run(scenario)
    file = tmp_path / "load.npz"
    file.write_bytes(case.rebalancer.loads.dump())
    load = read_window(file).estimate()
    share_E = SKEWED / SKEWED.sum()
    assert np.allclose(load.mean_LE / load.mean_LE.sum(axis=1, keepdims=True), share_E)
    assert {tuple(row) for row in load.rows_LMK[0]} == {(0, 7), (1, 2)}
