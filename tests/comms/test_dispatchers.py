"""Flat and hierarchical dispatchers against the reference, on every topology."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from comms.codec import WireFormat
from comms.dispatcher import TrafficLedger
from comms.reference import reference_combine, reference_dispatch
from comms.topology import Topology
from tests.comms.cases import Case, Outcome, exchange_both, make_inputs
from tests.comms.thread_world import run_threads

TOPOLOGIES = list(itertools.product((1, 2, 3), (1, 2, 3, 4)))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    nodes, ranks = draw(st.sampled_from(TOPOLOGIES))
    topology = Topology(num_nodes=nodes, ranks_per_node=ranks)
    slots_per_rank = draw(st.integers(1, 3))
    hidden = draw(st.sampled_from([1, 3, 24, 128, 130]))
    tokens = draw(st.lists(st.integers(0, 4), min_size=nodes * ranks, max_size=nodes * ranks))
    return Case(
        topology=topology,
        slots_per_rank=slots_per_rank,
        hidden=hidden,
        dispatch_dtype=draw(st.sampled_from(["bfloat16", "float8"])),
        combine=draw(st.sampled_from(["node", "exact"])),
        inputs=make_inputs(
            topology,
            tokens=tokens,
            slots_per_rank=slots_per_rank,
            hidden=hidden,
            num_topk=draw(st.integers(1, 5)),
            dtype=draw(st.sampled_from([torch.bfloat16, torch.float32])),
            pattern=draw(st.sampled_from(["random", "random", "random", "one", "local", "none"])),
            seed=draw(st.integers(0, 1000)),
        ),
    )


def check_case(case: Case, outcomes: list[tuple[Outcome, Outcome]]) -> None:
    """Everything that must hold whatever the inputs: bits, conservation, bytes."""
    received = reference_dispatch(case.inputs, case.slots_per_rank, case.dispatch_dtype)
    outputs = [flat.y_PH for flat, _ in outcomes]
    expected = reference_combine(
        outputs, case.inputs, case.topology, case.slots_per_rank, case.combine
    )
    for rank, pair in enumerate(outcomes):
        for outcome in pair:
            assert torch.equal(outcome.received.x_RH, received[rank].x_RH)
            assert torch.equal(outcome.received.local_slots_RK, received[rank].local_slots_RK)
            assert outcome.received.x_RH.dtype == case.inputs[rank].x_TH.dtype
            assert outcome.out_TH.dtype == case.inputs[rank].x_TH.dtype
            assert torch.equal(outcome.out_TH, expected[rank])
            assert outcome.repeats_equal
    sent_pairs = sum(int((i.slots_TK >= 0).sum()) for i in case.inputs)
    assert sum(len(flat.y_PH) for flat, _ in outcomes) == sent_pairs
    check_bytes(case, outcomes)


def check_bytes(case: Case, outcomes: list[tuple[Outcome, Outcome]]) -> None:
    """The ledgers against a closed form: which (token, node) and (token, rank) pairs there are."""
    topology, first = case.topology, case.inputs[0]
    per_node = case.slots_per_rank * topology.ranks_per_node
    row = WireFormat(
        hidden=case.hidden,
        num_topk=first.slots_TK.shape[1],
        dtype=first.x_TH.dtype,
        float8=case.dispatch_dtype == "float8",
    ).row_bytes
    crossings = scatters = direct = 0
    pairs_home = 0
    for source, mine in enumerate(case.inputs):
        for slots in mine.slots_TK.tolist():
            chosen = [slot for slot in slots if slot >= 0]
            nodes = {slot // per_node for slot in chosen}
            crossings += len(nodes - {topology.node_of(source)})
            pairs_home += sum(slot // per_node != topology.node_of(source) for slot in chosen)
            ranks = {slot // case.slots_per_rank for slot in chosen}
            scatters += sum(
                topology.local_rank_of(rank) != topology.local_rank_of(source) for rank in ranks
            )
            direct += len(ranks - {source})
    flat, hierarchical = TrafficLedger(topology=topology), TrafficLedger(topology=topology)
    for flat_outcome, hierarchical_outcome in outcomes:
        flat.merge(flat_outcome.ledger)
        hierarchical.merge(hierarchical_outcome.ledger)
    assert hierarchical.inter_node_bytes("dispatch/exchange") == crossings * row
    assert hierarchical.intra_node_bytes("dispatch/exchange") == 0
    assert hierarchical.intra_node_bytes("dispatch/scatter") == scatters * row
    assert hierarchical.inter_node_bytes("dispatch/scatter") == 0
    home_row = case.hidden * first.x_TH.element_size()
    home_rows = pairs_home if case.combine == "exact" else crossings
    assert hierarchical.inter_node_bytes("combine/exchange") == home_rows * home_row
    assert flat.inter_node_bytes("dispatch") + flat.intra_node_bytes("dispatch") == direct * row


@settings(max_examples=150, deadline=None)
@given(case=cases())
def test_any_case(case: Case) -> None:
    check_case(case, run_threads(exchange_both, case.topology, [case] * case.topology.world_size))


@pytest.mark.parametrize(("nodes", "ranks"), TOPOLOGIES)
def test_every_topology_over_processes(rank_pool, nodes: int, ranks: int) -> None:
    topology = Topology(num_nodes=nodes, ranks_per_node=ranks)
    float8, exact = (nodes + ranks) % 2 == 0, ranks % 2 == 0
    tokens = [(5 * rank + 3) % 4 for rank in range(topology.world_size)]  # some ranks have none
    case = Case(
        topology=topology,
        slots_per_rank=2,
        hidden=130,
        dispatch_dtype="float8" if float8 else "bfloat16",
        combine="exact" if exact else "node",
        inputs=make_inputs(topology, tokens=tokens, slots_per_rank=2, hidden=130, num_topk=4),
    )
    check_case(case, rank_pool.run(exchange_both, topology, case))
