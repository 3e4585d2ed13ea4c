"""Placements over time: EPLB's and ours, what moving costs, and when it is done."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from comms.topology import Topology
from router.placement import Placement
from router.policy import PolicyOptions
from router.split import resplit_optima
from simulations.balance.expert_moves import arrivals, relabelled, transfer_seconds
from simulations.balance.policies import Eplb, Fixed, Ours
from simulations.eplb import eplb

TOPOLOGY = Topology(num_nodes=2, ranks_per_node=4, tensor_parallel_size=1)
SLOTS = 5


def counts_of(seed, pairs=40000, layers=3, experts=32):
    rng = np.random.default_rng(seed)
    share = rng.lognormal(0, 1, (layers, experts))
    return np.random.default_rng([seed, 1]).multinomial(
        pairs, share / share.sum(axis=1, keepdims=True)
    )


def test_experts_in_order_and_empty_spare_slots():
    plans = Fixed(counts_of(0) / 1.0, TOPOLOGY, SLOTS)
    rows = plans.placement.physical_to_logical.reshape(3, 8, SLOTS)
    assert rows[:, :, :4].reshape(3, -1).tolist() == [list(range(32))] * 3
    assert (rows[:, :, 4] == -1).all()
    assert plans.look(counts_of(1), 9, 0.0) == 0.0
    assert (plans.next_change_s(), plans.advance(math.inf)) == (math.inf, [])


def eplb_plans(relabel):
    return Eplb(
        counts_of(0) / 1.0,
        TOPOLOGY,
        SLOTS,
        every=10,
        expert_bytes=1000,
        link_beta=500.0,
        relabel=relabel,
    )


@pytest.mark.parametrize("relabel", [False, True])
def test_eplb_is_planned_from_what_came_since_its_last_plan(relabel):
    plans = eplb_plans(relabel)
    before = plans.placement
    assert (before.physical_to_logical == eplb(counts_of(0) / 1.0, 40, 1, 2, 8)).all()
    assert plans.look(counts_of(1), 4, 0.0) == 0.0
    assert plans.advance(0.0) == []
    pause_s = plans.look(counts_of(2), 9, 0.0)
    mean = (counts_of(1) + counts_of(2)) / 10
    assert plans.load_LE == pytest.approx(mean)
    planned = eplb(mean, 40, 1, 2, 8)
    after = plans.placement.physical_to_logical

    def ranks_of(rows):
        return [sorted(tuple(sorted(rank)) for rank in row.reshape(8, -1).tolist()) for row in rows]

    assert ranks_of(after) == ranks_of(planned)
    assert relabel or (after == planned).all()
    assert plans.advance(0.0) == [0, 1, 2]
    assert plans.advance(0.0) == []
    moves = plans.placement.moves_from(before)
    (rebalance,) = plans.rebalances
    assert (rebalance.step, rebalance.layers, rebalance.moves) == (9, 3, len(moves))
    assert rebalance.bytes == 1000 * len(moves)
    received = np.bincount([move.slot // SLOTS for move in moves], minlength=8)
    assert pause_s == rebalance.pause_s == received.max() * 1000 / 500
    plans.look(counts_of(3), 18, 0.0)
    assert plans.look(counts_of(3), 19, 0.0) > 0  # ten steps after the last
    assert len(plans.rebalances) == 2


def test_relabelling_moves_fewer():
    plain, renamed = eplb_plans(False), eplb_plans(True)
    for plans in (plain, renamed):
        plans.look(counts_of(2), 9, 0.0)
    assert renamed.rebalances[0].moves < 0.9 * plain.rebalances[0].moves


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 12), st.integers(1, 4))
def test_relabelling_keeps_half_of_what_the_best_assignment_keeps(seed, ranks, slots):
    """Linear assignment (SciPy) is the most that any renaming of ranks can keep; a greedy matching
    keeps at least half of it (Avis, Networks 13, 1983)."""
    rng = np.random.default_rng(seed)
    before, row = rng.integers(-1, 2 * ranks, (2, ranks * slots))
    after = relabelled(row, before, slots)

    def sets(of_row):
        return [set(rank) - {-1} for rank in of_row.reshape(ranks, slots).tolist()]

    assert sorted(map(sorted, sets(after))) == sorted(map(sorted, sets(row)))
    common = np.array([[len(old & new) for new in sets(row)] for old in sets(before)])
    kept = sum(len(old & new) for old, new in zip(sets(before), sets(after), strict=True))
    best = common[linear_sum_assignment(-common)].sum()
    assert best >= kept >= best / 2


def test_relabelling_is_near_the_best_on_many_ranks():
    rng = np.random.default_rng(4)
    before, row = (rng.permutation(np.arange(320) % 256) for _ in range(2))
    old, new, planned = (
        [set(rank) for rank in of_row.reshape(64, 5).tolist()]
        for of_row in (before, relabelled(row, before, 5), row)
    )
    kept = sum(len(a & b) for a, b in zip(old, new, strict=True))
    common = np.array([[len(a & b) for b in planned] for a in old])
    assert kept >= 0.95 * common[linear_sum_assignment(-common)].sum()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6))
def test_arrivals_are_the_moves_of_placements(seed):
    rng = np.random.default_rng(seed)
    rows = [
        np.array([rng.permutation([*range(9), *rng.integers(-1, 9, 3)]) for _ in range(2)])
        for _ in range(2)
    ]
    before, after = (Placement(physical_to_logical=row, num_experts=9, num_ranks=4) for row in rows)
    moves = np.zeros((2, 4), dtype=int)
    for move in after.moves_from(before):
        moves[move.layer, move.slot // 3] += 1
    found = arrivals(after.physical_to_logical, before.physical_to_logical, 3)
    assert found.tolist() == moves.tolist()


def test_experts_come_from_the_nearest_holder_and_one_at_a_time():
    present = Placement(
        physical_to_logical=np.array([[0, 1, 2, 3, 4, 5, 6, -1]]),
        num_experts=7,
        num_ranks=4,
        ranks_per_node=2,
    )
    options = PolicyOptions(bytes_per_expert=100, bandwidth=50.0)

    def seconds(row):
        return transfer_seconds(present, 0, np.array(row), options)

    assert seconds([0, 1, 2, 3, 4, 5, 6, 0]) == 2.0
    assert seconds([0, 1, 2, 3, 5, 4, 6, -1]) == 0.0  # changes slots, not ranks
    assert seconds([2, 1, 0, 3, 4, 5, 6, 0]) == 4.0  # rank 0 sends its 0 to ranks 1 and 3
    assert seconds([2, 3, 0, 1, 4, 5, 6, -1]) == 4.0  # ranks 0 and 1 send and receive two each
    two = Placement(
        physical_to_logical=np.array([[0, 1, 2, 3, 4, 0, 5, 6]]),
        num_experts=7,
        num_ranks=4,
        ranks_per_node=2,
    )
    # rank 1 gets 0 from rank 0, rank 3 from rank 2: each from its own node
    assert transfer_seconds(two, 0, np.array([2, 1, 0, 3, 4, 6, 5, 0]), options) == 2.0


def ours(seed=0, **options):
    options = {"bytes_per_expert": 1000, "bandwidth": 1e4, **options}
    warm_up = [counts_of(seed), counts_of(seed) + 1]
    return Ours(warm_up, TOPOLOGY, SLOTS, PolicyOptions(**options), horizon=8.0)


def test_ours_starts_even_and_stays_while_nothing_changes():
    plans = ours()
    before = plans.placement
    assert resplit_optima(plans.load_LE, before).max() < 1.001
    for look in range(5):
        plans.look(counts_of(0), 10 * look, float(look))
    assert (plans.placement, plans.rebalances, plans.next_change_s()) == (before, [], math.inf)


def test_ours_changes_layer_by_layer_when_the_load_does():
    plans = ours()
    before, now_s, look = plans.placement, 0.0, 0
    while not plans.rebalances:
        plans.look(counts_of(7), look, now_s)
        look += 1
        assert look < 4
    (rebalance,) = plans.rebalances
    assert rebalance.layers == 3
    assert rebalance.bytes == 1000 * rebalance.moves
    assert rebalance.pause_s == 0.0
    assert (plans.advance(0.0), plans.placement) == ([], before)
    changed, moved = [], 0
    while (now_s := plans.next_change_s()) < math.inf:
        plans.look(counts_of(7), look, now_s)  # what is on its way is not reconsidered
        present = plans.placement
        (layer,) = plans.advance(now_s)
        changed.append(layer)
        moved += len(plans.placement.moves_from(present))
    assert sorted(changed) == [0, 1, 2]
    assert moved == rebalance.moves
    assert len(plans.rebalances) == 1
    assert resplit_optima(counts_of(7) / 1.0, plans.placement).max() < 1.03


def test_ours_does_not_move_what_does_not_pay():
    plans = ours(bandwidth=1.0, horizon_s=0.01)
    for look in range(4):
        plans.look(counts_of(7), look, 0.0)
    assert plans.rebalances == []
