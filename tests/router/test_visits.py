"""Choices of copies by node: fewest visits, least maximum, nothing lost, the same everywhere."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from router.placement import Placement
from router.visits import NodeChoice, node_sends


def random_layer(rng, num_nodes, ranks_per_node, slots, num_experts):
    """Any legal placement: empty slots, and several copies on a node or even on one rank."""
    spare = num_nodes * ranks_per_node * slots - num_experts
    row = np.concatenate([np.arange(num_experts), rng.integers(-1, num_experts, spare)])
    rng.shuffle(row)
    return Placement(
        physical_to_logical=row[None],
        num_experts=num_experts,
        num_ranks=num_nodes * ranks_per_node,
        ranks_per_node=ranks_per_node,
    ).layer(0)


@st.composite
def cases(draw, max_nodes=4):
    """(layer, ids_TK of every rank)"""
    num_nodes, ranks_per_node = draw(st.integers(1, max_nodes)), draw(st.integers(1, 3))
    slots = draw(st.integers(1, 4))
    num_ranks = num_nodes * ranks_per_node
    num_experts = draw(st.integers(max(1, num_ranks * slots // 2), num_ranks * slots))
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    layer = random_layer(rng, num_nodes, ranks_per_node, slots, num_experts)
    width = min(num_experts, draw(st.integers(1, 5)))
    popular_E = rng.gamma(0.5, size=num_experts) + 1e-3
    popular_E /= popular_E.sum()
    ids = []
    for _ in range(num_ranks):
        tokens = [
            rng.choice(num_experts, width, replace=False, p=popular_E)
            for _ in range(rng.integers(0, 12))
        ]
        ids_TK = np.array(tokens, dtype=np.int64).reshape(-1, width)
        ids_TK[rng.random(ids_TK.shape) < 0.1] = -1
        ids.append(ids_TK)
    return layer, ids


def nodes_of(layer, expert):
    return {int(s) // layer.slots_per_node for s in layer.logical_to_physical[expert] if s >= 0}


def fewest_visits(layer, experts, own):
    """By trying all sets of remote nodes, small ones first."""
    remote = [n for n in range(layer.num_nodes) if n != own]
    for size in range(len(remote) + 1):
        for chosen in itertools.combinations(remote, size):
            if all(nodes_of(layer, e) & {own, *chosen} for e in experts):
                return size
    raise AssertionError


def ranks_per_node(layer):
    return layer.slots_per_node // layer.slots_per_rank


def chosen(layer, ids, slack=0.0):
    """Preferred slots and the slots in the end, of every rank, as a cluster would find them."""
    choice, per_node = NodeChoice(layer), ranks_per_node(layer)
    preferred = [choice.prefer(ids_TK, r // per_node) for r, ids_TK in enumerate(ids)]
    size = layer.num_ranks * layer.slots_per_rank
    counts_RS = np.stack([np.bincount(s[s >= 0], minlength=size) for s in preferred])
    counts_NMS = counts_RS.reshape(layer.num_nodes, per_node, size)
    quota_S = choice.relieve(counts_RS.sum(axis=0), slack)
    quota_NS = choice.share(counts_NMS.sum(axis=1), quota_S)
    final = []
    for rank, (ids_TK, slots_TK) in enumerate(zip(ids, preferred, strict=True)):
        node, idx = divmod(rank, per_node)
        share_S = choice.share(counts_NMS[node], quota_NS[node])[idx]
        final.append(choice.change(ids_TK, slots_TK, share_S, node))
    return preferred, quota_S, final


def least_maximum(layer, counts_E):
    """By HiGHS; a flow with integer tokens needs no more than the next integer."""
    edges = [(e, int(s)) for e, row in enumerate(layer.logical_to_physical) for s in row if s >= 0]
    equal = np.zeros((layer.num_experts, len(edges) + 1))
    upper = np.zeros((layer.num_ranks, len(edges) + 1))
    for i, (expert, slot) in enumerate(edges):
        equal[expert, i] = upper[slot // layer.slots_per_rank, i] = 1.0
    upper[:, -1] = -1.0
    cost = np.append(np.zeros(len(edges)), 1.0)
    found = linprog(cost, upper, np.zeros(layer.num_ranks), equal, counts_E, method="highs")
    return int(np.ceil(found.fun - 1e-6))


@settings(max_examples=80, deadline=None)
@given(cases())
def test_tokens_prefer_the_fewest_nodes_there_are(case):
    layer, ids = case
    for rank, ids_TK in enumerate(ids):
        node = rank // ranks_per_node(layer)
        slots_TK = NodeChoice(layer).prefer(ids_TK, node)
        for experts, slots in zip(ids_TK, slots_TK, strict=True):
            used = node_sends(layer, slots[None], np.array([node]))
            assert used == fewest_visits(layer, experts[experts >= 0].tolist(), node)


@settings(max_examples=20, deadline=None)
@given(cases(max_nodes=7))
def test_with_many_nodes_preferred_slots_are_legal_and_no_fewer_than_needed(case):
    layer, ids = case
    choice = NodeChoice(layer)
    for rank, ids_TK in enumerate(ids):
        node = rank // ranks_per_node(layer)
        for experts, slots in zip(ids_TK, choice.prefer(ids_TK, node), strict=True):
            experts_of = [
                layer.logical_to_physical[e].tolist() if e >= 0 else [-1] for e in experts
            ]
            assert all(slot in row for slot, row in zip(slots, experts_of, strict=True))
            fewest = fewest_visits(layer, experts[experts >= 0].tolist(), node)
            assert fewest <= node_sends(layer, slots[None], np.array([node]))


@settings(max_examples=80, deadline=None)
@given(cases(), st.sampled_from([0.0, 0.02, 0.5]))
def test_every_token_keeps_its_experts_and_no_rank_exceeds_what_is_necessary(case, slack):
    layer, ids = case
    _, quota_S, final = chosen(layer, ids, slack)
    expert_of = {
        int(s): e for e, row in enumerate(layer.logical_to_physical) for s in row if s >= 0
    }
    for ids_TK, slots_TK in zip(ids, final, strict=True):
        assert [expert_of.get(int(s), -1) for s in slots_TK.ravel()] == ids_TK.ravel().tolist()
    everything = np.concatenate([s.ravel() for s in final])
    served_S = np.bincount(everything[everything >= 0], minlength=len(quota_S))
    assert served_S.tolist() == quota_S.tolist()

    load_R = served_S.reshape(layer.num_ranks, -1).sum(axis=1)
    total = np.concatenate([i.ravel() for i in ids])
    counts_E = np.bincount(total[total >= 0], minlength=layer.num_experts)
    mean = load_R.sum() / layer.num_ranks
    least = least_maximum(layer, counts_E)
    assert least <= load_R.max() <= max(least, int(mean * (1 + slack)))


@settings(max_examples=40, deadline=None)
@given(cases())
def test_nobody_changes_where_the_preferred_slots_are_even_enough(case):
    layer, ids = case
    preferred, _, final = chosen(layer, ids, slack=float(layer.num_ranks))
    for before, after in zip(preferred, final, strict=True):
        assert before.tolist() == after.tolist()


def test_shares_of_all_sources_make_up_the_quota():
    rng = np.random.default_rng(5)
    for _ in range(30):
        layer = random_layer(rng, 3, 2, 3, 12)
        choice = NodeChoice(layer)
        held = np.flatnonzero(np.isin(np.arange(18), layer.logical_to_physical))
        preferred_XS = np.zeros((4, 18), dtype=np.int64)
        preferred_XS[:, held] = rng.integers(0, 30, (4, len(held)))
        quota_S = choice.relieve(preferred_XS.sum(axis=0))
        share_XS = choice.share(preferred_XS, quota_S)
        assert share_XS.min() >= 0
        assert share_XS.sum(axis=0).tolist() == quota_S.tolist()
        for row in layer.logical_to_physical:
            copies = row[row >= 0]
            mine_X = preferred_XS[:, copies].sum(axis=1)
            assert share_XS[:, copies].sum(axis=1).tolist() == mine_X.tolist()


def test_those_change_that_lose_least():
    """Nodes of one rank: expert 0 on both, 1 on the first, 2 on the second."""
    placement = Placement(
        physical_to_logical=np.array([[0, 1, 0, 2]]), num_experts=3, num_ranks=2, ranks_per_node=1
    )
    choice = NodeChoice(placement.layer(0))
    ids_TK = np.array([[0, 1], [0, 2], [0, -1]])
    preferred_TK = choice.prefer(ids_TK, node=0)
    assert preferred_TK.tolist() == [[0, 1], [0, 3], [0, -1]]
    changed_TK = choice.change(ids_TK, preferred_TK, np.array([2, 1, 1, 1]), node=0)
    assert changed_TK.tolist() == [[0, 1], [2, 3], [0, -1]]  # it visits node 1 anyway

    # Leaving the own node saves nothing: the first token would have to visit another one.
    ids_TK = np.array([[0, -1, -1], [0, 1, 2]])
    preferred_TK = choice.prefer(ids_TK, node=0)
    changed_TK = choice.change(ids_TK, preferred_TK, np.array([1, 1, 1, 1]), node=0)
    assert changed_TK.tolist() == [[0, -1, -1], [2, 1, 3]]


def test_everything_everywhere_needs_no_visit():
    placement = Placement(
        physical_to_logical=np.tile(np.arange(4), 3)[None], num_experts=4, num_ranks=3,
        ranks_per_node=1,
    )  # fmt: skip
    ids_TK = np.random.default_rng(0).integers(0, 4, (20, 3))
    slots_TK = NodeChoice(placement.layer(0)).prefer(ids_TK, node=2)
    assert node_sends(placement.layer(0), slots_TK, np.full(20, 2)) == 0


def test_more_nodes_than_bits_are_refused():
    placement = Placement(
        physical_to_logical=np.arange(63)[None], num_experts=63, num_ranks=63, ranks_per_node=1
    )
    with pytest.raises(ValueError, match=r"num_nodes\(63\) must be at most 62"):
        NodeChoice(placement.layer(0))
