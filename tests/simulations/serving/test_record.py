"""Samples of a run become a few points of time."""

import pytest

from simulations.serving.record import MAX_POINTS, Record, Sample


def sample(end_s, **values):
    usual = dict.fromkeys(Sample._fields, 0) | {"input_tokens": 1, "balancedness": 1.0}
    return Sample(**usual | values | {"end_s": end_s})


def test_points_are_rates_and_means_of_their_time():
    record = Record()
    for step in range(1, 9):  # 0.5 s each: two points of 2 s
        record.add(sample(step / 2, output_tokens=step, running=step, kv_usage=step / 10))
    series = record.series()
    assert series["time_s"] == [2.0, 4.0]
    assert series["output_tokens_per_s"] == [(1 + 2 + 3 + 4) / 2, (5 + 6 + 7 + 8) / 2]
    assert series["running"] == [2.5, 6.5]
    assert series["kv_usage"] == pytest.approx([0.25, 0.65])


def test_where_nothing_happens_the_state_stays():
    record = Record()
    for step in range(8):
        record.add(sample(1 + step / 100, running=3, output_tokens=10))
    for step in range(8):
        record.add(sample(100 + step / 100, running=5, output_tokens=10))
    series = record.series()
    assert series["running"] == [3.0, 3.0, 3.0, 5.0]
    assert series["output_tokens_per_s"][1:3] == [0.0, 0.0]


def test_while_all_wait_there_are_samples_but_no_steps():
    record = Record()
    record.add(sample(1.0))
    record.add(sample(2.0, input_tokens=0, waiting=4))
    assert record.num_steps == 1
    assert len(record.samples()["end_s"]) == 2


def test_long_runs_have_no_more_points_than_a_picture_shows():
    record = Record()
    for step in range(10_000):
        record.add(sample(step * 0.1))
    assert len(record.series()["time_s"]) == MAX_POINTS
    assert Record().series()["time_s"] == []
