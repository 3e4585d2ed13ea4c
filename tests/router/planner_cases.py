"""Loads to plan for, and oracles that know nothing of how plans are made."""

import numpy as np
from hypothesis import strategies as st
from scipy.optimize import linprog

from router.load import ExpertLoad
from router.planner import plan


@st.composite
def clusters(draw, spare_slot=True):
    """(experts, sizes for plan()): with a spare slot per rank, or any number of experts that fits."""
    per_node, num_nodes = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    slots_per_rank = draw(st.integers(2 if spare_slot else 1, 5))
    num_ranks = per_node * num_nodes
    most = (slots_per_rank - 1) * num_ranks + 1 if spare_slot else slots_per_rank * num_ranks
    experts = draw(st.one_of(st.integers(1, most), st.just(most)))
    return experts, {
        "num_ranks": num_ranks,
        "slots_per_rank": slots_per_rank,
        "ranks_per_node": per_node,
    }


@st.composite
def loads(draw, experts):
    """[E]: zeros, one giant, equal, steep, integers, floats."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kind = draw(st.sampled_from(["zeros", "giant", "equal", "zipf", "some", "counts", "lognormal"]))
    if kind == "zeros":
        return np.zeros(experts)
    if kind == "giant":
        return np.where(np.arange(experts) == rng.integers(experts), 1e6, 0.0)
    if kind == "equal":
        return np.full(experts, 0.1)
    if kind == "zipf":
        return rng.permutation(np.arange(1, experts + 1) ** -draw(st.floats(0, 3)))
    if kind == "some":
        return (rng.random(experts) < 0.4) * rng.choice([1.0, 5.0], experts)
    if kind == "counts":
        return rng.integers(0, 1000, experts).astype(np.float64)
    return rng.lognormal(0, draw(st.floats(0, 3)), experts) * 1e-3


def planned(load_E, sizes, **more):
    return plan(ExpertLoad(mean_LE=np.asarray(load_E, dtype=np.float64)[None]), **sizes, **more)


def least_imbalance(row_S, load_E, num_ranks, speed_R=None):
    """max / mean of load / speed over ranks by linear programming (HiGHS)."""
    speed_R = np.ones(num_ranks) if speed_R is None else np.asarray(speed_R) / np.mean(speed_R)
    load_E = load_E / load_E.sum() * num_ranks
    slots = np.flatnonzero(row_S >= 0)
    on_rank = np.zeros((num_ranks, len(slots) + 1))
    on_rank[slots // (len(row_S) // num_ranks), np.arange(len(slots))] = 1
    on_rank[:, -1] = -speed_R
    of_expert = np.zeros((len(load_E), len(slots) + 1))
    of_expert[row_S[slots], np.arange(len(slots))] = 1
    solved = linprog(
        [*np.zeros(len(slots)), 1],
        A_ub=on_rank,
        b_ub=np.zeros(num_ranks),
        A_eq=of_expert,
        b_eq=load_E,
    )
    assert solved.success
    return solved.fun


def assert_legal(placement):
    for layer in range(placement.num_layers):
        assert (placement.replica_counts[layer] > 0).all()
        for rank in range(placement.num_ranks):
            mine = placement.physical_to_logical[layer, placement.slots_of_rank(rank)]
            assert len(set(mine[mine >= 0].tolist())) == (mine >= 0).sum()
