"""Requests that are drawn have the rates, gaps and lengths that were asked for."""

import numpy as np
import pytest

from simulations.serving.arrivals import Lengths, closed_arrivals, open_arrivals
from simulations.serving.faults import RECOVERY_S, Fault, check_faults

LENGTHS = {"prompt": Lengths(mean=1000, spread=0.5), "output": Lengths(mean=50)}


@pytest.mark.parametrize("burstiness", [1.0, 0.25])
def test_gaps_are_gamma_distributed(burstiness):
    """Mean 1 / rate, variance mean^2 / shape; shape 1 is the exponential of a Poisson process."""
    arrivals = open_arrivals(
        rate=20.0, num_requests=40_000, seed=1, burstiness=burstiness, **LENGTHS
    )
    gaps = np.diff([arrival.time_s for arrival in arrivals])
    assert gaps.mean() == pytest.approx(1 / 20, rel=0.03)
    assert gaps.var() == pytest.approx(1 / 20**2 / burstiness, rel=0.1)


def test_lengths_have_their_mean_and_spread():
    arrivals = closed_arrivals(num_requests=40_000, seed=2, **LENGTHS)
    prompts = np.array([arrival.prompt_tokens for arrival in arrivals])
    assert prompts.mean() == pytest.approx(1000, rel=0.02)
    assert np.log(prompts).std() == pytest.approx(0.5, rel=0.02)
    assert {arrival.output_tokens for arrival in arrivals} == {50}
    assert {arrival.time_s for arrival in arrivals} == {0.0}


def test_the_same_seed_gives_the_same_requests():
    draw = [open_arrivals(rate=3.0, num_requests=50, seed=seed, **LENGTHS) for seed in (5, 5, 6)]
    assert draw[0] == draw[1] != draw[2]


@pytest.mark.parametrize("text", ["", "x", "0", "-5", "10:x", "10:-1", "inf", "nan", "1:2:3"])
def test_lengths_that_cannot_be(text):
    with pytest.raises(ValueError, match=r"length|MEAN|spread"):
        Lengths.parse(text)


@pytest.mark.parametrize("rate", [0.0, -1.0, float("nan"), float("inf")])
def test_rates_that_cannot_be(rate):
    with pytest.raises(ValueError, match="rate must be a positive number"):
        open_arrivals(rate=rate, num_requests=1, seed=0, **LENGTHS)


def test_faults_are_read_and_put_in_order():
    assert Fault.parse("30:5") == Fault(time_s=30, rank=5, recovery_s=RECOVERY_S)
    late, early = Fault.parse("9:1:2.5"), Fault.parse("3:0:1")
    assert check_faults([late, early], 2) == (early, late)


@pytest.mark.parametrize(
    "text", ["", "5", "a:1", "1:b", "1:2:c", "1:2:3:4", "-1:0", "1:-2", "1:1:0"]
)
def test_faults_that_cannot_be(text):
    with pytest.raises(ValueError, match=r"TIME:RANK|a time of 0 s or later|longer than 0 s"):
        Fault.parse(text)


def test_a_rank_fails_only_where_there_is_one_that_lives():
    with pytest.raises(ValueError, match="ranks are 0 to 3"):
        check_faults([Fault(time_s=1, rank=4)], 4)
    with pytest.raises(ValueError, match="not back before 31 s"):
        check_faults([Fault(time_s=1, rank=0, recovery_s=30), Fault(time_s=20, rank=0)], 4)
