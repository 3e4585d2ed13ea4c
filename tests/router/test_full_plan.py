"""What surrounds the cut: nodes, slots left over, and what is already in place."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.full_plan import full_plan
from router.ranks import Ranks, num_moves
from tests.router.planner_cases import loads


def ranks_of(num_nodes, ranks_per_node, slots_per_rank):
    speed_R = np.ones(num_nodes * ranks_per_node)
    return Ranks(num_nodes=num_nodes, slots_per_rank=slots_per_rank, speed_R=speed_R)


def test_consecutive_striped_ranks_are_on_different_nodes():
    ranks = ranks_of(3, 4, 2)
    nodes = (ranks.striped // 4).tolist()
    assert sorted(ranks.striped.tolist()) == list(range(12))
    assert all(len(set(nodes[i : i + 3])) == 3 for i in range(10))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.integers(1, 5), st.data())
def test_on_one_node_slots_stay_empty_only_on_ranks_that_have_all_experts(num_ranks, slots, data):
    load_E = data.draw(loads(data.draw(st.integers(1, num_ranks * slots)))) + 1.0
    row_RS = full_plan(load_E, load_E, ranks_of(1, num_ranks, slots)).row_S.reshape(num_ranks, -1)
    for row in row_RS:
        assert (row >= 0).all() or len(set(row[row >= 0].tolist())) == len(load_E)


@pytest.mark.parametrize(("nodes", "per_node", "slots"), [(2, 5, 2), (3, 4, 3), (4, 2, 2)])
def test_loads_that_no_ring_fits_are_spread_over_nodes_too(nodes, per_node, slots):
    ranks, rng = ranks_of(nodes, per_node, slots), np.random.default_rng(3)
    experts = (slots - 1) * ranks.num_ranks + 1
    for _ in range(100):
        load_E = (rng.random(experts) < 0.4) * rng.choice([1.0, 5.0], experts) + 1e-9
        by_node = full_plan(load_E, load_E, ranks).row_S.reshape(nodes, -1)
        copies_E = np.bincount(by_node[by_node >= 0], minlength=experts)
        nodes_E = sum(np.isin(np.arange(experts), row) for row in by_node)
        assert np.array_equal(nodes_E, np.minimum(copies_E, nodes))


def test_a_plan_that_only_renames_nodes_and_ranks_moves_nothing():
    rng, ranks = np.random.default_rng(4), ranks_of(4, 4, 5)
    load_E = rng.lognormal(0, 1, 64)
    planned_NRS = full_plan(load_E, load_E, ranks).row_S.reshape(4, 4, 5)
    present_S = np.stack(
        [rng.permutation(node) for node in planned_NRS[rng.permutation(4)]]
    ).ravel()
    again = full_plan(load_E, load_E, ranks, present_S)
    assert num_moves(present_S, again.row_S, 5) == 0
    assert again.row_S.tolist() == present_S.tolist()


def test_moves_of_a_rank_are_what_it_did_not_have():
    assert num_moves(np.array([0, 1, 2, -1]), np.array([1, 3, -1, 2]), 2) == 1
