"""Placements by node: legal, even, the known best where there is one, the same in every process."""

import itertools
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose

from router import node_packing, node_sets
from router.affinity import plan_layer
from router.node_packing import pack
from router.node_sets import Demand, find_node_sets
from router.placement import Placement
from router.split import LayerSplit
from router.visits import NodeChoice, node_sends


def counts_of(rows_MK, num_experts):
    return np.bincount(rows_MK[rows_MK >= 0], minlength=num_experts).astype(np.float64)


def layer_of(row_S, num_experts, num_nodes, ranks_per_node):
    return Placement(
        physical_to_logical=row_S[None],
        num_experts=num_experts,
        num_ranks=num_nodes * ranks_per_node,
        ranks_per_node=ranks_per_node,
    ).layer(0)


def visits_per_token(layer, rows_MK):
    """Of tokens that start on every node in turn."""
    choice, total = NodeChoice(layer), 0
    for node in range(layer.num_nodes):
        slots_MK = choice.prefer(rows_MK, node)
        total += node_sends(layer, slots_MK, np.full(len(rows_MK), node))
    return total / (layer.num_nodes * len(rows_MK))


def topics(rng, num_topics, experts_per_topic, num_tokens, width):
    """Every token chooses within one topic; experts are numbered at random."""
    named = rng.permutation(num_topics * experts_per_topic).reshape(num_topics, -1)
    rows = [
        rng.choice(named[token % num_topics], width, replace=False) for token in range(num_tokens)
    ]
    return np.array(rows)


def demand_of(rows_MK, num_experts, num_nodes, ranks_per_node, slots_per_rank):
    load_E = counts_of(rows_MK, num_experts)
    return Demand(
        load=(load_E / load_E.sum()).tolist(),
        chosen=[
            sum(1 << m for m, row in enumerate(rows_MK) if e in row) for e in range(num_experts)
        ],
        num_tokens=len(rows_MK),
        pairs_per_token=rows_MK.shape[1],
        num_nodes=num_nodes,
        ranks_per_node=ranks_per_node,
        slots_per_rank=slots_per_rank,
    )


@st.composite
def problems(draw):
    num_nodes, ranks_per_node = draw(st.integers(2, 4)), draw(st.integers(1, 3))
    slots_per_rank = draw(st.integers(1, 4))
    slots = num_nodes * ranks_per_node * slots_per_rank
    num_experts = draw(st.integers(1, slots))
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    width = min(num_experts, draw(st.integers(1, 4)))
    popular_E = rng.gamma(draw(st.sampled_from([0.1, 1.0])), size=num_experts) + 1e-6
    popular_E /= popular_E.sum()
    rows = [rng.choice(num_experts, width, replace=False, p=popular_E) for _ in range(40)]
    mean_E = popular_E * draw(st.sampled_from([0.0, 1.0, 1e6]))
    return mean_E, np.array(rows), num_nodes, ranks_per_node, slots_per_rank


@settings(max_examples=60, deadline=None)
@given(problems())
def test_every_placement_is_legal(problem):
    mean_E, rows_MK, num_nodes, ranks_per_node, slots_per_rank = problem
    row_S = plan_layer(
        mean_E,
        rows_MK,
        num_nodes=num_nodes,
        ranks_per_node=ranks_per_node,
        slots_per_rank=slots_per_rank,
    )
    assert row_S.shape == (num_nodes * ranks_per_node * slots_per_rank,)
    layer_of(row_S, len(mean_E), num_nodes, ranks_per_node)  # raises if an expert has no copy
    for rank in row_S.reshape(-1, slots_per_rank).tolist():
        held = [expert for expert in rank if expert >= 0]
        assert len(held) == len(set(held))


def test_topics_that_fit_a_node_live_on_one():
    """Without spare slots, a token's one node is the best there is: remote for N - 1 of N."""
    rows_MK = topics(np.random.default_rng(3), 4, 6, 200, 3)
    row_S = plan_layer(
        counts_of(rows_MK, 24), rows_MK, num_nodes=4, ranks_per_node=2, slots_per_rank=3
    )
    assert visits_per_token(layer_of(row_S, 24, 4, 2), rows_MK) == 3 / 4


def test_where_every_expert_fits_every_node_nobody_travels():
    rows_MK = topics(np.random.default_rng(4), 2, 3, 60, 2)
    row_S = plan_layer(
        counts_of(rows_MK, 6), rows_MK, num_nodes=3, ranks_per_node=2, slots_per_rank=4
    )
    assert visits_per_token(layer_of(row_S, 6, 3, 2), rows_MK) == 0


@pytest.mark.parametrize("seed", range(6))
def test_near_the_best_of_all_placements_of_a_tiny_layer(seed, monkeypatch):
    """4 experts, 2 nodes, 3 slots each: all pairs of node contents; balance left aside."""
    monkeypatch.setattr(node_sets, "_SPILL", 0.0)
    monkeypatch.setattr(node_sets, "_ALONE", 100.0)
    monkeypatch.setattr(node_sets, "_LARGEST", 100.0)
    rng = np.random.default_rng(seed)
    rows_MK = np.array([rng.choice(4, 2, replace=False, p=[0.4, 0.3, 0.2, 0.1]) for _ in range(50)])
    row_S = plan_layer(
        counts_of(rows_MK, 4), rows_MK, num_nodes=2, ranks_per_node=1, slots_per_rank=3
    )
    best = min(
        np.mean([[any(e not in node for e in row) for row in rows_MK] for node in (a, b)])
        for a, b in itertools.product(itertools.combinations(range(4), 3), repeat=2)
        if set(a) | set(b) == set(range(4))
    )
    assert visits_per_token(layer_of(row_S, 4, 2, 1), rows_MK) == best


def test_cost_counts_the_nodes_that_tokens_visit():
    """Exactly, where a token has no two experts that only share a node by choice."""
    rng = np.random.default_rng(8)
    choices = [rng.integers(low, high, 80) for low, high in ((0, 3), (3, 12), (12, 21))]
    rows_MK = np.stack(choices, axis=1)
    demand = demand_of(rows_MK, 21, 4, 2, 5)
    sets = [(0, 1), (1, 3), (0, 1, 2, 3), *[(n % 4,) for n in range(18)]]
    costs = []
    for weight in (1.0, 0.0):  # the rest of the cost is about balance
        search = node_sets._Search(replace(demand, weight=weight))
        search.sets = sets
        costs.append(search.cost())
    needed = [[fewest_remote([sets[e] for e in row], own) for own in range(4)] for row in rows_MK]
    assert_allclose(costs[0] - costs[1], np.mean(needed))


def fewest_remote(sets, own):
    remote = [n for n in range(4) if n != own]
    subsets = (c for size in range(4) for c in itertools.combinations(remote, size))
    return next(len(c) for c in subsets if all({own, *c} & set(nodes) for nodes in sets))


def test_batches_divide_evenly_over_ranks():
    """Skewed loads, batches with sampling noise: no group of ranks is left with too much."""
    rng = np.random.default_rng(11)
    popular_E = rng.lognormal(0.0, 0.8, 32)
    popular_E /= popular_E.sum()
    rows_MK = np.array([rng.choice(32, 4, replace=False, p=popular_E) for _ in range(4000)])
    past_MK, future_MK = rows_MK[:2000], rows_MK[2000:]
    row_S = plan_layer(
        counts_of(past_MK, 32), past_MK, num_nodes=4, ranks_per_node=2, slots_per_rank=5
    )
    split = LayerSplit(layer_of(row_S, 32, 4, 2))
    for start in range(0, 2000, 500):
        counts_E = counts_of(future_MK[start : start + 500], 32).astype(np.int64)
        assert split.imbalance(counts_E) < 1.02


def test_an_expert_too_large_for_a_rank_gets_several_of_its_node():
    """Half of all pairs: 2 nodes x 4 ranks have an eighth each."""
    rows_MK = np.array([[0, 1 + n % 7] for n in range(70)])
    row_S = plan_layer(
        counts_of(rows_MK, 8), rows_MK, num_nodes=2, ranks_per_node=4, slots_per_rank=3
    )
    assert LayerSplit(layer_of(row_S, 8, 2, 4)).imbalance(10 * np.array([70, *[10] * 7])) < 1.01


def test_what_only_one_node_can_take_stays_below_its_share():
    """Three quarters of tokens choose within a topic that one node could hold: it must not."""
    rng = np.random.default_rng(6)
    rows_MK = np.array([rng.choice(7, 2, replace=False) + 7 * (m % 4 == 0) for m in range(200)])
    demand = replace(demand_of(rows_MK, 14, 2, 2, 4), weight=20.0)
    sets = find_node_sets(demand)
    for node in range(2):
        alone = sum(load for load, nodes in zip(demand.load, sets, strict=True) if nodes == (node,))
        assert alone <= 0.85 / 2 + 1e-9


def test_packing_links_all_ranks():
    """Twelve experts that two nodes hold each: enough to join 8 ranks, if none is wasted."""
    demand = Demand(
        load=[1 / 28] * 28, chosen=[0] * 28, num_tokens=1, pairs_per_token=4, num_nodes=4,
        ranks_per_node=2, slots_per_rank=5,
    )  # fmt: skip
    pairs = [(0, 1), (0, 1), (2, 3), (2, 3), (0, 2), (1, 3)]
    sets = [pair for pair in pairs for _ in range(2)] + [(e % 4,) for e in range(16)]
    as_filled = [rank for node in range(4) for rank in node_packing._fill_node(node, sets, demand)]
    assert len(linked(as_filled)) < 8
    assert len(linked(np.array(pack(sets, demand)).reshape(8, 5).tolist())) == 8


def linked(ranks):
    """The ranks that are joined to the first, over any number of shared experts."""
    group, size = {0}, 0
    while len(group) > size:
        size = len(group)
        held = {e for r in group for e in ranks[r] if e >= 0}
        group = {r for r, experts in enumerate(ranks) if held & set(experts)}
    return group


def test_the_same_in_every_process():
    code = """
import numpy as np
from router.affinity import plan_layer
rng = np.random.default_rng(1)
rows = np.array([rng.choice(24, 3, replace=False) for _ in range(300)])
mean = np.bincount(rows.ravel(), minlength=24) * 1.0
row = plan_layer(mean, rows, num_nodes=3, ranks_per_node=2, slots_per_rank=5).tolist()
"""
    here = {}
    exec(code, here)
    there = subprocess.run(
        [sys.executable, "-c", code + "print(row)"],
        env={"PYTHONHASHSEED": "12345"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert there.strip() == str(here["row"])


def test_the_search_ends(monkeypatch):
    monkeypatch.setattr(node_sets, "_TRIALS", 5)
    calls = []
    cost = node_sets._Search.cost
    monkeypatch.setattr(node_sets._Search, "cost", lambda self: calls.append(0) or cost(self))
    rows_MK = topics(np.random.default_rng(0), 4, 6, 50, 3)
    assert all(find_node_sets(demand_of(rows_MK, 24, 4, 2, 4)))
    assert len(calls) == 1 + 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_nodes": 1}, r"num_nodes\(1\).* needs 2 nodes or more"),
        ({"slots_per_rank": 1}, r"8 experts and .* slots_per_rank\(1\): .* a slot for each expert"),
        ({"rows_MK": np.zeros((0, 2), dtype=np.int64)}, r"rows_MK must be .* shape \[0, 2\]"),
        ({"rows_MK": np.full((3, 2), 8)}, r"expert ids in \[-1, 8\)"),
    ],
)
def test_bad_input_names_what_is_wrong(change, message):
    arguments = {
        "rows_MK": np.array([[0, 1]]), "num_nodes": 2, "ranks_per_node": 2, "slots_per_rank": 3,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        plan_layer(np.ones(8), **{**arguments, **change})
