"""The ring of hubs: closed, and pieces that are not small."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.hub_ring import hub_ring
from tests.router.planner_cases import least_imbalance, loads


def ring(load_E, num_ranks, slots_per_rank):
    capacity_R = np.full(num_ranks, load_E.sum() / num_ranks)
    return hub_ring(load_E, load_E, capacity_R, slots_per_rank, np.arange(num_ranks), 0.5)


@pytest.mark.parametrize(
    ("experts", "ranks", "slots"), [(256, 64, 5), (64, 16, 5), (128, 32, 5), (256, 32, 9)]
)
def test_every_slot_is_part_of_the_ring(experts, ranks, slots):
    """Walking from rank to rank along hubs never needs the same hub to get back: a cycle."""
    plan = ring(np.random.default_rng(1).lognormal(0, 1, experts), ranks, slots)
    assert sum(map(len, plan.experts_of_rank)) == ranks * slots
    holders = [
        [r for r, held in enumerate(plan.experts_of_rank) if e in held] for e in range(experts)
    ]
    edges = [(e, r) for e, ranks_of in enumerate(holders) if len(ranks_of) > 1 for r in ranks_of]
    hubs = {e for e, _ in edges}
    assert len(edges) == len(hubs) + ranks  # a connected graph with exactly one cycle
    reached, before = {0}, set()
    while reached != before:
        before = set(reached)
        reached |= {
            r
            for ranks_of in holders
            if len(ranks_of) > 1 and reached & set(ranks_of)
            for r in ranks_of
        }
    assert reached == set(range(ranks))


def test_pieces_of_lognormal_loads_are_a_tenth_of_a_rank_or_more():
    rng = np.random.default_rng(2)
    margins = [ring(rng.lognormal(0, 1, 256), 64, 5).margin for _ in range(30)]
    assert min(margins) > 0.1


def test_equal_loads_are_halved():
    """Every expert a hub of two pieces, every rank half of two: 8 ranks, 24 experts, 4 slots."""
    plan = ring(np.ones(24), 8, 4)
    assert plan.margin == pytest.approx(0.5 / 3)
    copies_E = np.bincount(np.concatenate(plan.experts_of_rank), minlength=24)
    assert sorted(copies_E.tolist()) == [1] * 16 + [2] * 8


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 8), st.integers(2, 5), st.data())
def test_a_margin_above_zero_means_that_every_rank_gets_its_mean(ranks, slots, data):
    most = (slots - 1) * ranks + 1
    load_E = data.draw(loads(data.draw(st.one_of(st.integers(1, most), st.just(most)))))
    load_E = load_E if load_E.any() else load_E + 1
    plan = ring(load_E, ranks, slots)
    row_S = [e for held in plan.experts_of_rank for e in held + [-1] * (slots - len(held))]
    if plan.margin > 0:
        assert least_imbalance(np.array(row_S), load_E, ranks) == pytest.approx(1, abs=1e-6)
