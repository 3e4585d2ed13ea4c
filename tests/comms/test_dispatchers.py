"""Flat and hierarchical dispatchers against the reference, on every topology."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from comms.codec import WireFormat
from comms.codecs import CODECS
from comms.dispatcher import Received
from comms.ledger import TrafficLedger
from comms.reference import reference_combine, reference_dispatch
from comms.topology import Topology
from tests.comms.cases import CAPACITY, WAYS, Case, Outcome, equal, exchange_all, make_inputs
from tests.comms.thread_world import run_threads

TOPOLOGIES = list(itertools.product((1, 2, 3, 5), (1, 2, 3, 4)))
ADDRESS_BYTES = 4


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
        dispatch_dtype=draw(st.sampled_from(["bfloat16", *CODECS])),
        combine=draw(st.sampled_from(["node", "exact", "fixed"])),
        combine_dtype=draw(st.sampled_from(["bfloat16", *CODECS])),
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


def check_case(case: Case, outcomes: list[dict[str, Outcome]]) -> None:
    """Everything that must hold whatever the inputs: bits, conservation, bytes."""
    received = reference_dispatch(case.inputs, case.slots_per_rank, case.dispatch_dtype)
    outputs = [of_rank["flat"].outputs[0] for of_rank in outcomes]
    expected = reference_combine(
        outputs,
        case.inputs,
        case.topology,
        case.slots_per_rank,
        case.combine,
        case.combine_dtype,
    )
    for rank, ways in enumerate(outcomes):
        for way, outcome in ways.items():
            check_received(case, rank, way, outcome, received[rank])
            assert outcome.out_TH.dtype == case.inputs[rank].x_TH.dtype
            assert equal(outcome.out_TH, expected[rank]), way
            assert outcome.repeats_equal, way
    sent_pairs = sum(int((i.slots_TK >= 0).sum()) for i in case.inputs)
    assert sum(len(y_PH) for y_PH in outputs) == sent_pairs
    check_bytes(case, outcomes)


def check_received(case: Case, rank: int, way: str, outcome: Outcome, expected: Received) -> None:
    """Payload, slots and order, bit for bit; and once more for the payload that reused the handle."""
    x_RH = torch.cat([part.x_RH for part in outcome.received])
    slots_RK = torch.cat([part.local_slots_RK for part in outcome.received])
    if way == "low_latency":
        assert len(x_RH) == case.topology.world_size * CAPACITY
    used = (slots_RK >= 0).any(dim=1)
    order = order_of_parts(case, rank) if way == "overlapped" else slice(None)
    assert x_RH.dtype == expected.x_RH.dtype
    assert torch.equal(x_RH[used], expected.x_RH[order])
    assert torch.equal(outcome.again_RH[used], expected.x_RH[order])
    assert torch.equal(slots_RK[used], expected.local_slots_RK[order])


def order_of_parts(case: Case, rank: int) -> Tensor:
    """The rows that a rank receives, those from its own node first."""
    per_rank, node_of = case.slots_per_rank, case.topology.node_of
    sources = [
        source
        for source, mine in enumerate(case.inputs)
        for slots in mine.slots_TK.tolist()
        if any(slot >= 0 and slot // per_rank == rank for slot in slots)
    ]
    elsewhere = torch.tensor([node_of(source) != node_of(rank) for source in sources]).long()
    return torch.argsort(elsewhere, stable=True)


def check_bytes(case: Case, outcomes: list[dict[str, Outcome]]) -> None:
    """The ledgers against a closed form: which (token, node) and (token, rank) pairs there are."""
    topology, first = case.topology, case.inputs[0]
    per_node = case.slots_per_rank * topology.ranks_per_node
    row = WireFormat(
        hidden=case.hidden,
        num_topk=first.slots_TK.shape[1],
        dtype=first.x_TH.dtype,
        codec=case.dispatch_dtype,
        num_slots=per_node * topology.num_nodes,
        with_range=case.combine == "fixed",
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
    dtype = first.x_TH.dtype
    home_row = case.hidden * dtype.itemsize
    if case.combine == "node":
        wire_dtype = dtype if case.combine_dtype == "bfloat16" else torch.float32
        home_row = CODECS[case.combine_dtype].row_bytes(case.hidden, wire_dtype)
    home_rows = pairs_home if case.combine == "exact" else crossings
    for way in WAYS:
        total = TrafficLedger(topology=topology)
        for of_rank in outcomes:
            total.merge(of_rank[way].ledger)
        if way == "flat":
            assert total.inter_node_bytes("dispatch") + total.intra_node_bytes("dispatch") == (
                direct * row
            )
            continue
        assert total.inter_node_bytes("dispatch/exchange") == crossings * (row + ADDRESS_BYTES)
        assert total.intra_node_bytes("dispatch/exchange") == 0
        assert total.intra_node_bytes("dispatch/scatter") == scatters * (row + ADDRESS_BYTES)
        assert total.inter_node_bytes("dispatch/scatter") == 0
        home = total.inter_node_bytes("combine/exchange")
        if case.combine == "fixed":  # beside the rows, headers and as many escapes as there are
            assert home >= home_rows * home_row
        else:
            assert home == home_rows * home_row


@settings(max_examples=150, deadline=None)
@given(case=cases())
def test_any_case(case: Case) -> None:
    check_case(case, run_threads(exchange_all, case.topology, [case] * case.topology.world_size))


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
    check_case(case, rank_pool.run(exchange_all, topology, case))
