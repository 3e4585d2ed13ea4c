"""What the simulated cluster does with requests, and with ranks that fail."""

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from cluster.engine.scheduler import Scheduler
from cluster.engine.sequence import SamplingParams, Sequence
from simulations.serving.arrivals import Arrival
from simulations.serving.faults import REGROUP_S, Fault
from simulations.serving.replica import work_of
from tests.simulations.serving.small import FixedStepper, limits, simulation

ARRIVALS = st.lists(
    st.builds(
        Arrival,
        st.floats(0, 5).map(lambda t: round(t, 3)),
        st.integers(1, 150),
        st.integers(1, 40),
    ),
    min_size=1,
    max_size=25,
).map(sorted)


def ended(sim):
    front = sim.front_end
    return len(front.finished) + front.num_rejected + front.num_failed


def test_batches_are_those_of_the_scheduler_alone():
    """A list that is there from the start: the plans that the engine would make of it."""
    requests = [Arrival(0.0, 7 + 13 * n % 90, 1 + 5 * n % 17) for n in range(20)]
    config = limits(num_blocks=12)  # so little that some are preempted
    scheduler = Scheduler(config)
    for n, (_, prompt, output) in enumerate(requests):
        params = SamplingParams(max_tokens=output, ignore_eos=True)
        scheduler.add(Sequence(str(n), list(range(prompt)), params))
    expected = []
    while scheduler.has_work:
        plan = scheduler.schedule()
        expected.append(work_of(plan))
        scheduler.update(plan, {item.seq_id: 1 for item in plan.items})
    assert scheduler.num_preemptions > 0

    stepper = FixedStepper(lambda work: 0.01)
    sim = simulation(requests, config=config, stepper=stepper)
    sim.run()
    assert [work for _, [work] in stepper.work] == expected
    assert sim.replicas[0].num_preemptions == scheduler.num_preemptions


@settings(max_examples=60, deadline=None)
@given(ARRIVALS, st.integers(1, 3), st.integers(4, 30), st.data())
def test_every_request_ends_once_with_the_tokens_it_asked_for(requests, replicas, blocks, data):
    """Whatever memory is short of and whoever fails; what never fits is refused."""
    faults = [
        Fault(
            time_s=data.draw(st.floats(0, 8)),
            rank=rank,
            recovery_s=data.draw(st.floats(0.1, 20)),
        )
        for rank in range(replicas)
        if data.draw(st.booleans())
    ]
    needed = data.draw(st.sets(st.integers(0, replicas - 1)))
    config = limits(num_blocks=blocks, max_model_len=160)
    sim = simulation(
        requests,
        num_replicas=replicas,
        config=config,
        stepper=FixedStepper(lambda work: 0.001 * (1 + max(w.tokens for w in work)), needed),
        faults=sorted(faults, key=lambda fault: fault.time_s),
    )
    sim.run()
    assert ended(sim) == len(requests) == sim.front_end.num_submitted
    capacity = blocks * config.block_size
    for request in sim.front_end.finished:
        _, prompt, output = request.arrival
        assert request.emitted == min(output, 160 - prompt)
        assert request.arrival.time_s < request.first_token_s <= request.finish_s
    finished = [r.arrival for r in sim.front_end.finished]
    fits = [a for a in requests if min(a.prompt_tokens + a.output_tokens, 160) <= capacity + 1]
    fits = [a for a in fits if a.prompt_tokens < min(160, capacity)]
    assert sorted(finished) == fits
    assert all(r.in_flight == 0 and not r.scheduler.has_work for r in sim.replicas)


def test_work_is_what_a_causal_model_computes():
    """Counted one query after the other: each sees itself and all before it."""
    scheduler = Scheduler(limits(max_num_batched_tokens=50))
    for n, prompt in enumerate([1, 30, 45]):
        params = SamplingParams(max_tokens=4, ignore_eos=True)
        scheduler.add(Sequence(str(n), list(range(prompt)), params))
    while scheduler.has_work:
        plan = scheduler.schedule()
        queries = [
            (item.start + place + 1, len(item.token_ids))
            for item in plan.items
            for place in range(len(item.token_ids))
        ]
        work = work_of(plan)
        assert work.tokens == len(queries)
        assert work.pairs == sum(keys for keys, _ in queries)
        assert work.kv_tokens == sum(keys for keys, others in queries if others == 1)
        assert work.logits == len(plan.logit_items)
        scheduler.update(plan, {item.seq_id: 1 for item in plan.items})


def test_short_of_blocks_the_youngest_is_preempted_and_none_is_lost():
    requests = [Arrival(0.0, 60, 60) for _ in range(4)]
    sim = simulation(requests, config=limits(num_blocks=20))
    sim.run()
    assert sim.replicas[0].num_preemptions > 0
    assert [r.emitted for r in sim.front_end.finished] == [60] * 4
    assert sim.record.samples()["kv_usage"].max() > 0.9


def test_a_lost_replica_s_requests_go_on_elsewhere():
    """Rank 0 ends in the middle of a step; what it held goes on from prompt and emitted tokens."""
    requests = [Arrival(0.0, 32, 50) for _ in range(4)]
    stepper = FixedStepper(lambda work: 0.1)
    sim = simulation(
        requests,
        num_replicas=2,
        config=limits(max_num_batched_tokens=256),
        stepper=stepper,
        faults=[Fault(time_s=1.05, rank=0)],
    )
    sim.run()
    assert sim.front_end.num_resubmitted == 2
    assert [r.emitted for r in sim.front_end.finished] == [50] * 4
    samples = sim.record.samples()
    before = samples["output_tokens"][samples["end_s"] < 2]
    assert before.sum() == 4 * 10, "what the step of the failure had computed is lost"
    resumed = next(time_s for time_s, work in stepper.work if time_s > 1.05)
    assert resumed == pytest.approx(1.05 + REGROUP_S)
    work = next(work for time_s, work in stepper.work if time_s > 1.05)
    assert work[0].tokens == 0
    assert work[1].tokens == 2 + 2 * (32 + 10), "two decode on, two come with what they had"
    [event] = [event for event in sim.record.events if event.kind == "failure"]
    assert event.time_s == 1.05
    assert "requests sent again: 2;" in event.what


def test_experts_without_a_copy_that_lives_hold_everybody_up():
    requests = [Arrival(0.0, 10, 30) for _ in range(2)]
    stepper = FixedStepper(lambda work: 0.1, needed=[1])
    fault = Fault(time_s=0.55, rank=1, recovery_s=40.0)
    sim = simulation(requests, num_replicas=2, stepper=stepper, faults=[fault])
    sim.run()
    after = [time_s for time_s, _ in stepper.work if time_s > 0.55]
    assert after[0] == pytest.approx(0.55 + 40.0 + REGROUP_S)
    assert [e.kind for e in sim.record.events] == ["failure", "recovery"]


def test_with_every_replica_lost_requests_wait_for_the_first_to_return():
    requests = [Arrival(0.0, 10, 30), Arrival(5.0, 10, 30)]
    fault = Fault(time_s=0.1, rank=0, recovery_s=20.0)
    sim = simulation(requests, faults=[fault])
    sim.run()
    assert [r.emitted for r in sim.front_end.finished] == [30, 30]
    assert all(r.finish_s > 20.1 + REGROUP_S for r in sim.front_end.finished)


def test_a_full_queue_refuses_as_the_gateway_does():
    requests = [Arrival(0.0, 10, 30) for _ in range(9)]
    sim = simulation(requests, max_num_queued_reqs=5)
    sim.run()
    assert sim.front_end.num_rejected == 4
    assert "the queue is full: 5 requests in flight" in sim.front_end.first_refusal
    assert len(sim.front_end.finished) == 5


def test_requests_are_admitted_when_they_come_not_when_the_step_is_over():
    """The second comes while the first, which is all the queue holds, is in its only step."""
    sim = simulation(
        [Arrival(0.0, 10, 1), Arrival(0.05, 10, 1), Arrival(0.15, 10, 1)],
        stepper=FixedStepper(lambda work: 0.1),
        max_num_queued_reqs=1,
    )
    sim.run()
    assert [r.arrival.time_s for r in sim.front_end.finished] == [0.0, 0.15]
    assert sim.front_end.num_rejected == 1


def test_requests_go_to_the_least_loaded_replica():
    stepper = FixedStepper(lambda work: 0.1)
    sim = simulation([Arrival(0.0, 8, 4)] * 6, num_replicas=3, stepper=stepper)
    sim.run()
    assert [w.tokens for w in stepper.work[0][1]] == [16, 16, 16]


def test_asked_to_stop_it_keeps_what_is_done():
    sim = simulation([Arrival(0.0, 8, 40)] * 3)
    steps = iter(range(5))
    sim.run(stop=lambda: next(steps, None) is None)
    assert sim.record.num_steps == 5
    assert not sim.front_end.finished
