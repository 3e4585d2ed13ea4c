"""The exact cut: a theorem, so any load at the limit of its condition must obey it."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.exact_cut import exact_cut
from tests.router.planner_cases import least_imbalance, loads


def row(cut, slots):
    return np.array([e for experts in cut for e in experts + [-1] * (slots - len(experts))])


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 10), st.integers(2, 5), st.data())
def test_every_rank_carries_the_mean(num_ranks, slots, data):
    most = (slots - 1) * num_ranks + 1
    load_E = data.draw(loads(data.draw(st.one_of(st.integers(1, most), st.just(most)))))
    load_E = load_E if load_E.any() else load_E + 1
    cut = exact_cut(load_E.tolist(), [load_E.sum() / num_ranks] * num_ranks, slots)
    assert {e for experts in cut for e in experts} == set(range(len(load_E)))
    assert all(len(set(experts)) == len(experts) <= slots for experts in cut)
    assert least_imbalance(row(cut, slots), load_E, num_ranks) == pytest.approx(1, abs=1e-6)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 8), st.integers(1, 4), st.data())
def test_more_experts_than_the_theorem_allows_still_fit(num_ranks, slots, data):
    load_E = data.draw(loads(data.draw(st.integers(1, slots * num_ranks))))
    cut = exact_cut(load_E.tolist(), [load_E.sum() / num_ranks] * num_ranks, slots)
    assert {e for experts in cut for e in experts} == set(range(len(load_E)))
    assert all(len(set(experts)) == len(experts) <= slots for experts in cut)
