"""Placements: every expert has a copy, every slot one expert, copies on distinct ranks."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from router.placement import Move, Placement, settle


@st.composite
def contiguous_placements(draw):
    per_node = draw(st.integers(1, 4))
    num_ranks = per_node * draw(st.integers(1, 4))
    num_experts = draw(st.integers(1, 40))
    redundant = draw(st.integers(0, 12))
    layers = draw(st.integers(1, 3))
    placement = Placement.contiguous(
        layers,
        num_experts,
        num_ranks,
        redundant,
        ranks_per_node=per_node,
        epoch=draw(st.integers(0, 9)),
    )
    return placement, redundant


@settings(max_examples=200, deadline=None)
@given(contiguous_placements())
def test_contiguous_places_every_expert_and_every_redundant_copy(case):
    placement, redundant = case
    physical, experts = placement.physical_to_logical, placement.num_experts
    assert physical.shape == (placement.num_layers, placement.num_ranks * placement.slots_per_rank)
    assert placement.slots_per_rank == int(np.ceil((experts + redundant) / placement.num_ranks))
    for layer in range(placement.num_layers):
        counts = np.bincount(physical[layer][physical[layer] >= 0], minlength=experts)
        assert counts.min() >= 1
        assert counts.sum() == experts + redundant
        assert np.array_equal(counts, placement.replica_counts[layer])
        hosts = [
            set(placement.experts_of_rank(layer, r).values()) for r in range(placement.num_ranks)
        ]
        distinct = all(sum(e in host for host in hosts) == counts[e] for e in range(experts))
        assert distinct or placement.slots_per_rank > experts or counts.max() > placement.num_ranks
        if distinct and redundant <= experts and placement.slots_per_rank < experts:
            assert counts.max() <= 3


@settings(max_examples=100, deadline=None)
@given(contiguous_placements())
def test_the_two_directions_are_inverse_and_slots_are_unique(case):
    placement, _ = case
    for layer in range(placement.num_layers):
        seen = []
        for expert, row in enumerate(placement.logical_to_physical[layer]):
            slots = row[row >= 0]
            assert (placement.physical_to_logical[layer, slots] == expert).all()
            seen += slots.tolist()
        assert len(seen) == len(set(seen)) == (placement.physical_to_logical[layer] >= 0).sum()
        for rank in range(placement.num_ranks):
            first = placement.slots_of_rank(rank).start
            for local_slot, expert in placement.experts_of_rank(layer, rank).items():
                assert placement.physical_to_logical[layer, first + local_slot] == expert


@settings(max_examples=100, deadline=None)
@given(contiguous_placements(), st.data())
def test_chosen_slots_hold_the_expert_on_the_nearest_node(case, data):
    placement, _ = case
    layer = placement.layer(0)
    source = data.draw(st.integers(0, placement.num_ranks - 1))
    ids_TK = torch.randint(-1, placement.num_experts, (7, 3))
    slots_TK = layer.choose_slots(ids_TK, source)
    assert slots_TK.dtype == torch.int64
    assert torch.equal(slots_TK == -1, ids_TK == -1)
    per_node = placement.ranks_per_node
    for expert, slot in zip(ids_TK.flatten().tolist(), slots_TK.flatten().tolist(), strict=True):
        if expert < 0:
            continue
        assert placement.physical_to_logical[0, slot] == expert
        copies = placement.logical_to_physical[0, expert]
        nodes = {int(c) // placement.slots_per_rank // per_node for c in copies if c >= 0}
        if source // per_node in nodes:
            assert slot // placement.slots_per_rank // per_node == source // per_node


def test_even_counts_are_cut_into_equal_runs():
    placement = Placement.contiguous(2, 8, 4)
    assert placement.physical_to_logical.tolist() == [list(range(8))] * 2
    assert placement.slots_of_rank(3) == range(6, 8)


def test_uneven_counts_leave_slots_empty():
    placement = Placement.contiguous(1, 5, 3)
    assert placement.physical_to_logical.tolist() == [[0, -1, 1, 2, 3, 4]]
    assert placement.experts_of_rank(0, 0) == {0: 0}
    assert Placement.contiguous(1, 2, 4).physical_to_logical.tolist() == [[-1, 0, -1, 1]]


def test_redundant_copies_go_to_another_node():
    placement = Placement.contiguous(1, 8, 4, 4, ranks_per_node=2)
    slots_per_node = placement.slots_per_rank * 2
    for expert in np.flatnonzero(placement.replica_counts[0] == 2):
        nodes = placement.logical_to_physical[0, expert] // slots_per_node
        assert len(set(nodes.tolist())) == 2


def test_sources_spread_over_the_copies_of_an_expert():
    physical = np.array([[0, 1, 0, 2, 0, 3]])
    one_node = Placement(physical_to_logical=physical, num_experts=4, num_ranks=3).layer(0)
    ids = torch.tensor([[0, 3]])
    assert [one_node.choose_slots(ids, r).tolist() for r in range(3)] == [
        [[0, 5]],
        [[2, 5]],
        [[4, 5]],
    ]
    nodes = Placement(physical_to_logical=physical, num_experts=4, num_ranks=3, ranks_per_node=1)
    assert [nodes.layer(0).choose_slots(ids, r)[0, 0].item() for r in range(3)] == [0, 2, 4]


@given(st.integers(1, 20), st.integers(1, 6))
def test_with_one_copy_the_source_does_not_matter(num_experts, num_ranks):
    layer = Placement.contiguous(1, num_experts, num_ranks).layer(0)
    ids = torch.arange(num_experts).unsqueeze(0)
    expected = layer.choose_slots(ids, 0)
    assert all(torch.equal(layer.choose_slots(ids, r), expected) for r in range(num_ranks))


@settings(max_examples=60, deadline=None)
@given(contiguous_placements())
def test_copies_are_listed_in_ascending_order_and_padded(case):
    """The same table, written as loops."""
    placement, _ = case
    for layer, row in enumerate(placement.physical_to_logical.tolist()):
        copies = [
            [slot for slot, e in enumerate(row) if e == x] for x in range(placement.num_experts)
        ]
        width = placement.logical_to_physical.shape[2]
        padded = [slots + [-1] * (width - len(slots)) for slots in copies]
        assert placement.logical_to_physical[layer].tolist() == padded


def test_other_rows_make_the_next_epoch():
    placement = Placement.contiguous(3, 4, 2, epoch=5)
    row = np.array([3, 2, 1, 0])
    changed = placement.with_layers({1: row})
    assert changed.physical_to_logical.tolist() == [[0, 1, 2, 3], [3, 2, 1, 0], [0, 1, 2, 3]]
    assert (changed.epoch, placement.with_layers({}, epoch=9).epoch) == (6, 9)
    assert placement.physical_to_logical[1].tolist() == [0, 1, 2, 3]
    with pytest.raises(ValueError, match=r"layer 1 has no copy of experts \[2, 3\]"):
        placement.with_layers({1: np.array([0, 1, 1, 0])})


def test_moves_are_what_is_new_to_a_rank():
    before = Placement(
        physical_to_logical=np.array([[0, 1, 2, -1]] * 2), num_experts=3, num_ranks=2
    )
    after = before.with_layers({1: np.array([1, 0, 0, 2])})  # rank 0 only swaps its slots
    assert after.moves_from(before) == [Move(layer=1, slot=2, expert=0)]
    assert before.moves_from(after) == []
    assert before.moves_from(before) == []


@given(st.integers(1, 4), st.integers(1, 5), st.randoms(use_true_random=False))
def test_what_stays_keeps_its_slot(num_ranks, slots_per_rank, random):
    def row():
        ranks = [random.sample(range(-1, 7), slots_per_rank) for _ in range(num_ranks)]
        return np.array([e for rank in ranks for e in rank])

    current, target = row(), row()
    settled = settle(current, target, slots_per_rank)
    for start in range(0, len(target), slots_per_rank):
        mine = slice(start, start + slots_per_rank)
        assert sorted(settled[mine].tolist()) == sorted(target[mine].tolist())
        for slot in range(mine.start, mine.stop):
            if current[slot] >= 0 and current[slot] in target[mine]:
                assert settled[slot] == current[slot]


def test_a_placement_cannot_be_changed():
    physical = np.arange(4).reshape(1, 4)
    placement = Placement(physical_to_logical=physical, num_experts=4, num_ranks=2, epoch=3)
    physical[0, 0] = 2
    assert placement.physical_to_logical[0, 0] == 0
    with pytest.raises(ValueError, match="read-only"):
        placement.physical_to_logical[0, 0] = 1
    assert placement.layer(0).epoch == placement.epoch == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"physical_to_logical": [[0, 1, 2, -1]]}, r"layer 0 has no copy of experts \[3\]"),
        ({"physical_to_logical": [[0, 1, 2, 4]]}, r"slot 3 holds expert 4, outside .*\(4\)"),
        ({"num_ranks": 3}, r"\[1, 4\] is not \[layers, num_ranks\(3\) \* slots_per_rank\]"),
        ({"ranks_per_node": 4}, r"num_ranks\(2\) is no multiple of ranks_per_node\(4\)"),
        ({"num_ranks": 0}, r"num_ranks\(0\) must be >= 1"),
        ({"epoch": -1}, r"epoch\(-1\) >= 0"),
    ],
)
def test_impossible_placements_show_their_numbers(arguments, message):
    valid = {"physical_to_logical": [[0, 1, 2, 3]], "num_experts": 4, "num_ranks": 2}
    with pytest.raises(ValueError, match=message):
        Placement(**{**valid, **arguments})


def test_impossible_counts_are_refused():
    with pytest.raises(ValueError, match=r"num_redundant_experts\(-1\) must be >= 0"):
        Placement.contiguous(1, 4, 2, -1)
    with pytest.raises(ValueError, match=r"rank\(2\) is outside"):
        Placement.contiguous(1, 4, 2).slots_of_rank(2)
