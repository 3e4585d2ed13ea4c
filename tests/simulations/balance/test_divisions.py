"""How tokens divide over copies, and where they go: against production code and plain loops."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from comms.topology import Topology
from router.placement import Placement
from router.split import LayerSplit
from simulations.balance.divisions import (
    EvenDivision,
    ResplitDivision,
    StaticDivision,
    static_choice,
)
from simulations.balance.sampled_traffic import SampledTraffic, sends_of
from simulations.deployment import Deployment
from simulations.presets import load_model
from simulations.traffic import Wire, link_bytes, node_traffic, node_visits


@st.composite
def placements(draw):
    """(placement of 2 layers, topology, generator)."""
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    topology = Topology(
        num_nodes=draw(st.integers(1, 3)),
        ranks_per_node=draw(st.sampled_from([1, 2, 4])),
        tensor_parallel_size=1,
    )
    slots = topology.world_size * draw(st.integers(1, 4))
    experts = draw(st.integers(1, slots))
    rows = []
    for _ in range(2):
        spare = rng.integers(-1, experts, slots - experts)
        rows.append(rng.permutation(np.concatenate([np.arange(experts), spare])))
    placement = Placement(
        physical_to_logical=np.array(rows),
        num_experts=experts,
        num_ranks=topology.world_size,
        ranks_per_node=topology.ranks_per_node,
    )
    return placement, topology, rng


def divisions(topology, origins):
    return {
        "even": EvenDivision(origins),
        "static": StaticDivision(origins, topology),
        "resplit": ResplitDivision(),
    }


@settings(max_examples=60, deadline=None)
@given(placements())
def test_no_division_loses_tokens(case):
    placement, topology, rng = case
    for origins in {1, topology.num_nodes}:
        counts = rng.integers(0, 50, (3, origins, 2, placement.num_experts))
        for division in divisions(topology, origins).values():
            division.follow(placement, range(2))
            slots = division.slots(counts)
            assert slots.shape == (3, 2, placement.num_slots)
            for layer in range(2):
                row = placement.physical_to_logical[layer]
                assert not slots[:, layer, row < 0].any()
                for expert in range(placement.num_experts):
                    expected = counts[:, :, layer, expert].sum(axis=1)
                    assert slots[:, layer, row == expert].sum(axis=1) == pytest.approx(expected)
            one = division.slots(counts[:, :, 1:], slice(1, 2))
            assert (one == slots[:, 1:]).all()


@settings(max_examples=30, deadline=None)
@given(placements())
def test_counts_of_all_nodes_alike_where_nodes_differ(case):
    placement, topology, rng = case
    nodes = topology.num_nodes
    counts = rng.integers(0, 50, (2, 1, 2, placement.num_experts))
    for division in divisions(topology, nodes).values():
        division.follow(placement, range(2))
        together = division.slots(counts * nodes)
        assert together == pytest.approx(division.slots(np.repeat(counts, nodes, axis=1)), rel=1e-5)


@settings(max_examples=60, deadline=None)
@given(placements())
def test_static_choice_is_production_s(case):
    placement, topology, _ = case
    table = static_choice(placement.layer(0), topology)
    ids = torch.arange(placement.num_experts)[:, None]
    for row, rank in zip(table, topology.leader_ranks, strict=True):
        assert row.tolist() == placement.layer(0).choose_slots(ids, rank)[:, 0].tolist()


def test_static_choice_of_replicas_that_are_several_ranks():
    topology = Topology(num_nodes=2, ranks_per_node=4, tensor_parallel_size=2)
    row = [0, 1, 0, 1, 0, 1, 0, 2, 0, 1, 1, 0, 2, 0, 1, 0]
    placement = Placement(
        physical_to_logical=np.array([row]), num_experts=3, num_ranks=8, ranks_per_node=4
    )
    table = static_choice(placement.layer(0), topology)
    ids = torch.tensor([[0], [1], [2]])
    for replica, leader in enumerate((0, 2, 4, 6)):
        chosen = placement.layer(0).choose_slots(ids, leader)[:, 0].tolist()
        assert table[replica].tolist() == chosen


@settings(max_examples=40, deadline=None)
@given(placements())
def test_even_and_static_parts_by_plain_loops(case):
    placement, topology, rng = case
    nodes = topology.num_nodes
    counts = rng.integers(0, 50, (1, nodes, 2, placement.num_experts))
    even, static = EvenDivision(nodes), StaticDivision(nodes, topology)
    for division in (even, static):
        division.follow(placement, range(2))
    for layer in range(2):
        row, copies = placement.physical_to_logical[layer], placement.layer(layer)
        of_even, of_static = np.zeros((2, placement.num_slots))
        for node in range(nodes):
            for expert in range(placement.num_experts):
                count = counts[0, node, layer, expert]
                for slot in np.flatnonzero(row == expert):
                    of_even[slot] += count / (row == expert).sum()
                for rank in topology.node_ranks(node):
                    slot = int(copies.choose_slots(torch.tensor([expert]), rank)[0])
                    of_static[slot] += count / topology.ranks_per_node
        assert even.slots(counts)[0, layer] == pytest.approx(of_even, rel=1e-5)
        assert static.slots(counts)[0, layer] == pytest.approx(of_static, rel=1e-5)


@settings(max_examples=40, deadline=None)
@given(placements())
def test_resplit_is_that_of_each_batch(case):
    placement, _, rng = case
    counts = rng.integers(0, 50, (4, 1, 2, placement.num_experts))
    division = ResplitDivision()
    division.follow(placement, range(2))
    rank = division.slots(counts).reshape(4, 2, placement.num_ranks, -1).sum(axis=3)
    for layer in range(2):
        one = LayerSplit(placement.layer(layer))
        assert rank[:, layer].max(axis=1).tolist() == [one.optimum(c[0, layer]) for c in counts]


@settings(max_examples=40, deadline=None)
@given(placements())
def test_tokens_go_to_copies_of_their_experts(case):
    placement, topology, rng = case
    tokens = 3 * topology.world_size
    source = np.arange(tokens) // 3
    ids = rng.integers(-1, placement.num_experts, (tokens, 2))
    for name, division in divisions(topology, 1).items():
        division.follow(placement, range(2))
        slots = division.choose(1, ids, source)
        assert (slots[ids < 0] == -1).all()
        assert (placement.physical_to_logical[1][slots[ids >= 0]] == ids[ids >= 0]).all()
        if name == "static":
            for rank in range(topology.world_size):
                mine = torch.from_numpy(ids[source == rank])
                wanted = placement.layer(1).choose_slots(mine, rank)
                assert slots[source == rank].tolist() == wanted.tolist()
        if name == "resplit":
            mine = np.bincount(ids[ids >= 0], minlength=placement.num_experts)
            load = np.bincount(
                slots[slots >= 0] // placement.slots_per_rank, minlength=topology.world_size
            )
            assert load.max(initial=0) == LayerSplit(placement.layer(1)).optimum(mine)


def test_divisions_follow_layers_that_change():
    before = Placement(
        physical_to_logical=np.array([[0, 1, 2, -1]] * 2), num_experts=3, num_ranks=2
    )
    after = before.with_layers({1: np.array([0, 1, 2, 0])})
    counts = np.array([[[[8, 0, 4], [8, 0, 4]]]])
    for division in divisions(Topology(num_nodes=1, ranks_per_node=2), 1).values():
        division.follow(before, range(2))
        assert division.slots(counts)[0].tolist() == [[8, 0, 4, 0]] * 2
        division.follow(after, [1])
        slots = division.slots(counts)[0]
        assert slots[0].tolist() == [8, 0, 4, 0]
        assert slots[1, [1, 2]].tolist() == [0, 4]
    assert slots[1].tolist() == [6, 0, 4, 2]  # the last one re-splits


# Traffic ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dispatcher", ["hierarchical", "flat"])
def test_sampled_traffic_is_that_of_the_exact_model(dispatcher):
    """Rows, bytes and the matrix of nodes as `traffic.link_bytes` has them from the same slots."""
    topology = Topology(num_nodes=3, ranks_per_node=4, tensor_parallel_size=1)
    model = load_model("mosaic")
    redundant = -model.num_experts % 12
    deployment = Deployment(
        model=model, topology=topology, num_redundant_experts=redundant, dispatcher=dispatcher
    )
    rng = np.random.default_rng(0)
    tokens, top_k = 5 * 12, model.gate.num_experts_per_token
    keys = rng.random((tokens, deployment.num_slots))
    slots = np.argsort(keys, axis=1)[:, :top_k]
    slots[0] = -1
    slots[1, 1:] = -1
    source = np.arange(tokens) // 5
    found = SampledTraffic(deployment).of_layer(slots, source)
    visits = node_visits(slots.reshape(12, 5, top_k), topology, deployment.slots_per_rank)
    wire = Wire(
        hidden=model.hidden_size,
        num_topk=top_k,
        num_slots=deployment.num_slots,
        dispatcher=dispatcher,
        dispatch_dtype="float8",
    )
    exact = node_traffic(link_bytes(visits, wire), topology)
    assert found.bytes_NN * tokens == pytest.approx(exact)
    away = ~np.eye(3, dtype=bool)[topology_nodes(topology)]
    assert found.nodes * tokens == pytest.approx((visits.nodes_RN * away).sum())
    assert found.ranks * tokens == pytest.approx(visits.tokens_RR.sum())
    sends = sends_of([found, found])
    assert sends.nodes_per_token_L.tolist() == [found.nodes] * 2
    assert sends.ranks_per_token_L.tolist() == [found.ranks] * 2


def topology_nodes(topology):
    return [topology.node_of(rank) for rank in range(topology.world_size)]


def test_rows_by_hand():
    """2 nodes x 2 ranks x 2 slots. Token 0 of rank 0 needs ranks 1, 2, 3 (2 twice); token 1 of
    rank 3 only its own."""
    topology = Topology(num_nodes=2, ranks_per_node=2, tensor_parallel_size=1)
    slots, source = np.array([[2, 4, 5, 6], [6, 7, -1, -1]]), np.array([0, 3])
    model = load_model("mosaic")
    rows = {}
    for dispatcher in ("hierarchical", "flat", "low_latency"):
        deployment = Deployment(
            model=model,
            topology=topology,
            num_redundant_experts=-model.num_experts % 4,
            dispatcher=dispatcher,
        )
        traffic = SampledTraffic(deployment)
        traffic._slots_per_rank = 2
        found = traffic.of_layer(slots, source)
        assert (found.nodes, found.ranks) == (0.5, 2.0)
        rows[dispatcher] = (2 * found.node_rows, 2 * found.rank_rows)
    # one copy to node 1, where rank 2 hands it to rank 3; rank 0 hands it to rank 1
    assert rows["hierarchical"] == (1, 2)
    assert rows["flat"] == (2, 1)  # to ranks 2 and 3, to rank 1
    assert rows["low_latency"] == (3, 1)
