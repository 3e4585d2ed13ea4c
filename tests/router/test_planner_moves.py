"""Plans from a placement: nothing moves without need, what moves is counted, nothing gets worse."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.load import ExpertLoad
from router.placement import Placement
from router.planner import PlanOptions, plan
from tests.router.planner_cases import assert_legal, clusters, least_imbalance, loads, planned

SIZES = {"num_ranks": 64, "slots_per_rank": 5, "ranks_per_node": 8}


def drifted(rng, load_E, rho):
    log_E = rho * np.log(load_E) + np.sqrt(1 - rho**2) * rng.standard_normal(len(load_E))
    return np.exp(log_E)


@settings(max_examples=80, deadline=None)
@given(clusters(spare_slot=False), st.data(), st.sampled_from([None, 0, 1, 3]))
def test_plans_from_a_placement_are_legal_counted_and_never_worse(cluster, data, max_moves):
    experts, sizes = cluster
    first_E, then_E = (data.draw(loads(experts)) + 1e-4 for _ in range(2))
    current = planned(first_E, sizes).placement
    result = planned(then_E, sizes, current=current, options=PlanOptions(max_moves=max_moves))
    assert_legal(result.placement)
    assert result.placement.epoch == current.epoch + 1
    explained = result.layers[0]
    moves = result.placement.moves_from(current)
    assert explained.moves == result.moves == len(moves)
    if max_moves is not None:
        assert len(moves) <= max_moves
    before, after = (
        least_imbalance(p.physical_to_logical[0], then_E, sizes["num_ranks"])
        for p in (current, result.placement)
    )
    assert explained.imbalance == pytest.approx(after, abs=1e-5)
    assert after <= before + 1e-6
    if before <= 1.02 - 1e-6 or not moves:
        assert result.placement.physical_to_logical.tolist() == current.physical_to_logical.tolist()
        assert explained.reason.startswith("kept")


def test_a_small_drift_moves_a_few_experts_to_the_target():
    rng = np.random.default_rng(4)
    load_E = rng.lognormal(0, 1, 256)
    current = planned(load_E, SIZES).placement
    for rho, most in ((0.95, 16), (0.8, 40)):
        now_E = drifted(rng, load_E, rho)
        result = planned(now_E, SIZES, current=current)
        assert result.moves <= most
        assert least_imbalance(result.placement.physical_to_logical[0], now_E, 64) <= 1.02 + 1e-6
        assert f"{result.moves} move" in result.layers[0].reason


def test_one_hot_expert_needs_one_copy():
    """Two ranks of three slots, one of them with all the load: a second copy halves it."""
    current = Placement(
        physical_to_logical=np.array([[0, 1, -1, 2, 3, -1]]), num_experts=4, num_ranks=2
    )
    result = planned([10.0, 0, 0, 0], {"num_ranks": 2, "slots_per_rank": 3}, current=current)
    assert result.placement.physical_to_logical.tolist() == [[0, 1, -1, 2, 3, 0]]
    assert result.layers[0].imbalance == 1.0
    assert result.layers[0].reason == "1 move: 2.000 -> 1.000"


def test_without_spare_slots_two_experts_change_places():
    current = Placement(physical_to_logical=np.array([[0, 1, 2, 3]]), num_experts=4, num_ranks=2)
    result = planned([3.0, 3, 1, 1], {"num_ranks": 2, "slots_per_rank": 2}, current=current)
    assert result.moves == 2
    assert result.layers[0].imbalance == 1.0


def test_equally_bad_ranks_are_helped_one_by_one():
    """Two ranks have 4 of mean 2 each: the first move cannot lower the maximum, the second does."""
    current = Placement(
        physical_to_logical=np.array([[0, -1, 1, -1, 2, -1, 3, -1]]), num_experts=4, num_ranks=4
    )
    sizes, one = {"num_ranks": 4, "slots_per_rank": 2}, PlanOptions(max_moves=1)
    first = planned([4.0, 4, 0, 0], sizes, current=current, options=one)
    assert (first.moves, first.layers[0].imbalance) == (1, 2.0)
    second = planned([4.0, 4, 0, 0], sizes, current=first.placement, options=one)
    assert (second.moves, second.layers[0].imbalance) == (1, 1.0)


def test_only_the_layers_asked_for_change():
    rng = np.random.default_rng(5)
    sizes = {"num_ranks": 16, "slots_per_rank": 5, "ranks_per_node": 4}
    current = plan(ExpertLoad(mean_LE=rng.lognormal(0, 1, (3, 64))), **sizes).placement
    load = ExpertLoad(mean_LE=rng.lognormal(0, 1, (3, 64)))
    result = plan(load, current=current, layers=[1], **sizes)
    assert {move.layer for move in result.placement.moves_from(current)} == {1}
    assert [layer.reason for layer in result.layers[::2]] == ["kept: not to be changed"] * 2


def test_a_budget_that_is_spent_still_improves():
    rng = np.random.default_rng(6)
    first_E, then_E = rng.lognormal(0, 1, (2, 64))
    sizes = {"num_ranks": 16, "slots_per_rank": 5, "ranks_per_node": 4}
    placement = planned(first_E, sizes).placement
    seen = [least_imbalance(placement.physical_to_logical[0], then_E, 16)]
    for _ in range(40):
        result = planned(then_E, sizes, current=placement, options=PlanOptions(max_moves=2))
        if not result.moves:
            break
        assert result.moves <= 2
        placement = result.placement
        seen.append(result.layers[0].imbalance)
    assert seen == sorted(seen, reverse=True)
    assert seen[-1] <= 1.02 + 1e-6


def test_a_placement_of_another_size_is_refused():
    current = Placement.contiguous(1, 8, 4, 4)
    with pytest.raises(
        ValueError, match=r"current placement \(1 layers, 8 experts, 4 ranks \* 3 slots\)"
    ):
        planned(np.ones(8), {"num_ranks": 4, "slots_per_rank": 4}, current=current)
