"""When refused clients are told to come back: in step with how fast requests end."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.server.pace import Pace

TIME_CONSTANT_S = 5.0
SHORTEST_S, LONGEST_S = 0.05, 60.0


@given(
    steps=st.lists(st.tuples(st.floats(0, 100), st.booleans()), max_size=60),
    first_s=st.floats(0.1, 10),
)
def test_whatever_happens_the_answer_is_bounded(steps, first_s):
    pace, now = Pace(first_s), 0.0
    for passed_s, ended in steps:
        now += passed_s
        if ended:
            pace.ended(now)
        else:
            answer = pace.retry_after(now)
            assert answer == first_s or SHORTEST_S <= answer <= LONGEST_S


def test_before_anything_has_ended_it_is_what_was_configured():
    pace = Pace(2.5)
    assert [pace.retry_after(now) for now in (0.0, 0.1, 9.0)] == [2.5] * 3


def test_what_ended_long_ago_tells_nothing():
    pace = Pace(2.5)
    for idx in range(100):
        pace.ended(idx / 10)
    assert pace.retry_after(10.0) < 1
    assert pace.retry_after(1000.0) == 2.5


@pytest.mark.parametrize(("ends_per_s", "refusals_per_s"), [(10, 1), (10, 10), (20, 200), (5, 2)])
def test_in_the_long_run_it_is_the_time_to_serve_those_refused_lately(ends_per_s, refusals_per_s):
    """Both averages are exponential, of one time constant: it takes that long times their ratio."""
    pace = Pace(1.0)
    ends = [idx / ends_per_s for idx in range(60 * ends_per_s)]
    refusals = [(idx + 0.5) / refusals_per_s for idx in range(60 * refusals_per_s)]
    moments = [(now, pace.ended) for now in ends] + [(now, pace.retry_after) for now in refusals]
    answer = [tell(now) for now, tell in sorted(moments, key=lambda moment: moment[0])][-1]
    answer = answer or pace.retry_after(60.0)
    expected = min(TIME_CONSTANT_S * refusals_per_s / ends_per_s, LONGEST_S)
    assert answer == pytest.approx(expected, rel=0.3)
