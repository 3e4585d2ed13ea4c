"""Plans with too few spare slots to cut the load: legal, and as even as EPLB's at least."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.packed_copies import packed_copies
from router.ranks import Ranks
from simulations.eplb import eplb, even_rank_loads
from tests.router.planner_cases import assert_legal, least_imbalance, loads, planned


@st.composite
def tight(draw):
    """(load, ranks): fewer spare slots than ranks, of different speeds."""
    num_nodes, per_node = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    num_ranks, slots = num_nodes * per_node, draw(st.integers(1, 4))
    experts = num_ranks * slots - draw(st.integers(0, num_ranks - 1))
    speed = np.random.default_rng(draw(st.integers(0, 99))).uniform(0.5, 2, num_ranks)
    speed = speed if draw(st.booleans()) else np.ones(num_ranks)
    ranks = Ranks(num_nodes=num_nodes, slots_per_rank=slots, speed_R=speed / speed.mean())
    load = draw(loads(experts))
    return load if load.any() else np.ones(experts), ranks


@settings(max_examples=200, deadline=None)
@given(tight())
def test_every_expert_is_somewhere_and_none_twice_on_a_rank(case):
    load, ranks = case
    bins = packed_copies(load, ranks)
    assert len(bins) == ranks.num_ranks
    assert {expert for experts in bins for expert in experts} == set(range(len(load)))
    for experts in bins:
        assert len(set(experts)) == len(experts) <= ranks.slots_per_rank


@settings(max_examples=60, deadline=None)
@given(tight())
def test_exchanges_end_where_none_helps_the_fullest_rank(case):
    load, ranks = case
    bins = packed_copies(load, ranks)
    copies = np.bincount([e for experts in bins for e in experts], minlength=len(load))
    share = load / copies
    time = np.array([share[experts].sum() for experts in bins]) / ranks.speed_R
    fullest = int(time.argmax())
    for mine in bins[fullest]:
        for rank, theirs in enumerate(bins):
            for other in theirs:
                if mine in theirs or other in bins[fullest]:
                    continue
                less = share[mine] - share[other]
                here = time[fullest] - less / ranks.speed_R[fullest]
                there = time[rank] + less / ranks.speed_R[rank]
                assert max(here, there) >= time[fullest] * (1 - 1e-6)


@pytest.mark.parametrize(
    ("experts", "nodes", "per_node", "slots"),
    [(256, 18, 8, 2), (256, 9, 8, 4), (256, 4, 8, 8), (128, 10, 8, 2), (64, 3, 8, 3)],
)
def test_plans_are_as_even_as_eplb_s_where_they_cannot_be_exact(experts, nodes, per_node, slots):
    """DeepSeek's 144 ranks x 2 slots and SGLang's 72 x 4 among them."""
    num_ranks = nodes * per_node
    load = np.random.default_rng(0).lognormal(0, 1, experts)
    result = planned(
        load, {"num_ranks": num_ranks, "slots_per_rank": slots, "ranks_per_node": per_node}
    )
    assert_legal(result.placement)
    theirs = eplb(load[None], num_ranks * slots, 1, nodes, num_ranks)
    of_rank = even_rank_loads(theirs, load[None], num_ranks)[0]
    ours = result.layers[0].imbalance
    row = result.placement.physical_to_logical[0]
    assert ours == pytest.approx(least_imbalance(row, load, num_ranks), abs=1e-6)
    assert ours <= of_rank.max() / of_rank.mean() * (1 + 1e-9)


def test_equal_loads_come_out_equal():
    ranks = Ranks(num_nodes=2, slots_per_rank=2, speed_R=np.ones(4))
    bins = packed_copies(np.ones(8), ranks)
    assert sorted(e for experts in bins for e in experts) == list(range(8))
    assert [len(experts) for experts in bins] == [2, 2, 2, 2]
