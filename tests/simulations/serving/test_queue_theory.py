"""The simulated queue against formulas that know nothing of it."""

import numpy as np
import pytest

from simulations.serving.arrivals import Lengths, closed_arrivals, open_arrivals
from tests.simulations.serving.small import FixedStepper, limits, simulation

ONE = Lengths(mean=1)


def pollaczek_khinchine(rate: float, service_s: float) -> float:
    """Mean wait before service of an M/D/1 queue (Kleinrock, Queueing Systems I, 5.7)."""
    load = rate * service_s
    return load * service_s / (2 * (1 - load))


@pytest.mark.parametrize("load", [0.3, 0.6, 0.85])
def test_one_request_a_step_is_an_md1_queue(load):
    """One sequence at a time, whose prompt's step gives its only token: a server of fixed time."""
    service_s = 0.05
    arrivals = open_arrivals(
        rate=load / service_s, num_requests=40_000, prompt=ONE, output=ONE, seed=3
    )
    sim = simulation(
        arrivals,
        config=limits(max_num_seqs=1),
        stepper=FixedStepper(lambda work: service_s),
    )
    sim.run()
    waits = [r.finish_s - r.arrival.time_s - service_s for r in sim.front_end.finished]
    assert len(waits) == len(arrivals)
    assert np.mean(waits) == pytest.approx(
        pollaczek_khinchine(load / service_s, service_s), rel=0.06
    )
    served = [r.arrival.time_s for r in sim.front_end.finished]
    assert served == sorted(served), "first come, first served"


def test_users_of_a_closed_loop_get_what_is_left_of_a_step():
    """n users, one token each a step of d seconds: n / d tokens a second (interactive response law)."""
    users, step_s, tokens = 3, 0.02, 10
    arrivals = closed_arrivals(
        num_requests=300, prompt=Lengths(mean=8), output=Lengths(mean=tokens), seed=0
    )
    sim = simulation(arrivals, stepper=FixedStepper(lambda work: step_s), concurrency=users)
    sim.run()
    assert sim.now_s == pytest.approx(300 * tokens * step_s / users)
    steps = sim.record.samples()
    assert (steps["running"] + steps["waiting"] <= users).all()


@pytest.mark.parametrize("replicas", [1, 3])
def test_littles_law_holds_exactly(replicas):
    """Requests in the system, summed over time, are the times that requests spent there."""
    arrivals = open_arrivals(
        rate=40.0,
        num_requests=500,
        prompt=Lengths(mean=40, spread=0.7),
        output=Lengths(mean=12, spread=0.5),
        seed=11,
    )
    sim = simulation(arrivals, num_replicas=replicas)
    sim.run()
    sojourns = [r.finish_s - r.arrival.time_s for r in sim.front_end.finished]
    assert len(sojourns) == len(arrivals)
    assert sim.record.request_seconds == pytest.approx(sum(sojourns), rel=1e-12)
