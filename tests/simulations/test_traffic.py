"""Bytes by link against the ledgers of the real dispatchers, and rows against plain loops.

T tokens of a rank, K experts per token, H hidden.
"""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.model.config import ModelConfig
from comms.base import BaseDispatcher
from comms.groups import ParallelGroups
from comms.launch import RankPool
from comms.ledger import TrafficLedger
from comms.make import make_dispatcher
from comms.topology import Topology
from deploy.settings import BUNDLED_MODELS
from simulations.deployment import Deployment
from simulations.traffic import added, link_bytes, node_traffic, node_visits, wire_rows
from simulations.wire import ESCAPE_BYTES, Wire
from tests.comms.thread_world import run_threads

NUM_TOPK = 3


@dataclass(frozen=True, kw_only=True)
class Case:
    topology: Topology
    slots_per_rank: int
    hidden: int
    dtype: str
    options: dict[str, str]
    dispatcher: str
    slots: list[np.ndarray]
    """By rank [T, K]."""
    escapes: bool = False

    @property
    def wire(self) -> Wire:
        return Wire(
            hidden=self.hidden,
            num_topk=NUM_TOPK,
            num_slots=self.topology.world_size * self.slots_per_rank,
            dtype=self.dtype,
            dispatcher=self.dispatcher,
            **self.options,
        )


@st.composite
def cases(draw) -> Case:
    topology = Topology(num_nodes=draw(st.integers(1, 3)), ranks_per_node=draw(st.integers(1, 3)))
    slots_per_rank = draw(st.integers(1, 3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    num_slots = topology.world_size * slots_per_rank
    slots = [
        rng.integers(-1, num_slots, (draw(st.integers(0, 6)), NUM_TOPK))
        for _ in range(topology.world_size)
    ]
    codecs = st.sampled_from(["bfloat16", "float8", "float8_ue8m0", "logfmt10", "int6", "int10"])
    return Case(
        topology=topology,
        slots_per_rank=slots_per_rank,
        hidden=draw(st.sampled_from([1, 3, 64, 129])),
        dtype=draw(st.sampled_from(["bfloat16", "float32"])),
        dispatcher=draw(st.sampled_from(["hierarchical", "flat", "low_latency"])),
        options={
            "dispatch_dtype": draw(codecs),
            "combine": draw(st.sampled_from(["node", "exact", "fixed"])),
            "combine_dtype": draw(codecs),
        },
        slots=slots,
    )


def one_layer(groups: ParallelGroups, case: Case) -> TrafficLedger:
    """Experts that give back what they get, on one rank."""
    dispatcher: BaseDispatcher = make_dispatcher(
        case.dispatcher,
        groups,
        slots_per_rank=case.slots_per_rank,
        hidden=case.hidden,
        **case.options,
    )
    slots_TK = torch.from_numpy(case.slots[groups.rank])
    x_TH = torch.ones(len(slots_TK), case.hidden, dtype=getattr(torch, case.dtype))
    weights_TK = torch.full(slots_TK.shape, 1.0)
    # The grid is as wide as 2^15 * range: a range far too small makes every sum an escape.
    range_T = torch.full((len(slots_TK),), 0.01 if case.escapes else 100.0)
    fixed = case.options["combine"] == "fixed"
    received, handle = dispatcher.dispatch(x_TH, slots_TK, weights_TK, range_T if fixed else None)
    rows_P = (received.local_slots_RK >= 0).nonzero()[:, 0]
    dispatcher.combine(received.x_RH[rows_P], handle)
    return dispatcher.ledger


def merged(ledgers: list[TrafficLedger]) -> dict[tuple[str, int, int], int]:
    total = ledgers[0]
    for ledger in ledgers[1:]:
        total.merge(ledger)
    return total.num_bytes


def as_rows(links) -> dict[tuple[str, int, int], int]:
    return {
        (stage, int(source), int(destination)): int(bytes_RR[source, destination])
        for stage, bytes_RR in links.items()
        for source, destination in np.argwhere(bytes_RR)
    }


@settings(deadline=None, max_examples=150)
@given(cases())
def test_every_byte_of_the_ledgers_is_predicted(case):
    ledgers = run_threads(one_layer, case.topology, [case] * case.topology.world_size)
    visits = node_visits(case.slots, case.topology, case.slots_per_rank)
    assert as_rows(link_bytes(visits, case.wire)) == merged(ledgers)


def test_escapes_are_the_only_bytes_that_depend_on_data():
    """A token on one rank whose two experts are on the other node: every channel escapes."""
    case = Case(
        topology=Topology(num_nodes=2, ranks_per_node=1),
        slots_per_rank=2,
        hidden=64,
        dtype="bfloat16",
        dispatcher="hierarchical",
        options={"combine": "fixed"},
        slots=[np.array([[2, 3, -1]]), np.zeros((0, NUM_TOPK), np.int64)],
        escapes=True,
    )
    booked = merged(run_threads(one_layer, case.topology, [case] * 2))
    visits = node_visits(case.slots, case.topology, case.slots_per_rank)
    escapes_RR = np.array([[0, 0], [64, 0]])
    assert as_rows(link_bytes(visits, case.wire, escapes_RR)) == booked
    without = as_rows(link_bytes(visits, case.wire))
    home = ("combine/exchange", 1, 0)
    assert booked[home] - without[home] == 64 * ESCAPE_BYTES == 384


def on_processes(groups: ParallelGroups, case: Case) -> TrafficLedger:
    return one_layer(groups, case)


@pytest.mark.parametrize("dispatcher", ["hierarchical", "flat"])
def test_real_ranks_book_the_same(rank_pool: RankPool, dispatcher):
    rng = np.random.default_rng(5)
    case = Case(
        topology=Topology(num_nodes=2, ranks_per_node=2),
        slots_per_rank=4,
        hidden=256,
        dtype="bfloat16",
        dispatcher=dispatcher,
        options={"combine": "fixed", "dispatch_dtype": "float8"},
        # More than one chunk of packing, and a rank without tokens.
        slots=[rng.integers(0, 16, (tokens, NUM_TOPK)) for tokens in (300, 0, 7, 31)],
    )
    ledgers = rank_pool.run(on_processes, case.topology, case)
    visits = node_visits(case.slots, case.topology, case.slots_per_rank)
    assert as_rows(link_bytes(visits, case.wire)) == merged(ledgers)


@given(cases())
def test_visits_are_what_plain_loops_count(case):
    visits = node_visits(case.slots, case.topology, case.slots_per_rank)
    for source, slots_TK in enumerate(case.slots):
        ranks = [[s // case.slots_per_rank for s in row if s >= 0] for row in slots_TK.tolist()]
        for rank in range(case.topology.world_size):
            assert visits.pairs_RR[source, rank] == sum(row.count(rank) for row in ranks)
            assert visits.tokens_RR[source, rank] == sum(rank in row for row in ranks)
        for node in range(case.topology.num_nodes):
            needed = [node in {case.topology.node_of(rank) for rank in row} for row in ranks]
            assert visits.nodes_RN[source, node] == sum(needed)


@given(cases())
def test_batches_and_nodes_add_up(case):
    visits = node_visits(case.slots, case.topology, case.slots_per_rank)
    links = link_bytes(visits, case.wire)
    twice = added([links, links])
    assert {stage: (2 * links[stage]).tolist() for stage in links} == {
        stage: bytes_RR.tolist() for stage, bytes_RR in twice.items()
    }
    total = sum(int(bytes_RR.sum()) for bytes_RR in links.values())
    traffic_NN = node_traffic(links, case.topology)
    assert int(traffic_NN.sum()) == total
    if case.dispatcher != "flat":
        across = sum(int(b.sum()) for stage, b in links.items() if stage.endswith("/exchange"))
        assert int(traffic_NN.sum() - np.trace(traffic_NN)) == across


def test_rows_of_deepseek_v3():
    """Payload + 52 bytes out (docs/communication.md), bfloat16 back (arXiv:2412.19437, 3.2)."""
    wire = Wire(hidden=7168, num_topk=8, num_slots=320, dispatch_dtype="float8")
    assert wire.rows.dispatch_exchange == wire.rows.dispatch_scatter == 7168 + 4 * 56 + 52
    assert wire.rows.combine_reduce == 4 * 7168
    assert wire.rows.combine_exchange == 2 * 7168
    assert Wire(hidden=7168, num_topk=8, num_slots=1 << 16).row_bytes == 2 * 7168 + 52 + 16


def test_rows_of_a_deployment():
    deployment = Deployment(
        model=ModelConfig.from_dir(BUNDLED_MODELS["mosaic"]),
        topology=Topology(num_nodes=2, ranks_per_node=2),
        dispatch_dtype="float8",
    )
    rows = wire_rows(deployment)
    assert rows.dispatch_exchange == 256 + 2 * 4 + 4 * (2 + 4) + 4
    assert rows.combine_exchange == 512


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden": 0}, r"hidden\(0\), num_topk\(2\) and num_slots\(4\) must be >= 1"),
        ({"dtype": "float99"}, "dtype must be the name of a torch dtype, got 'float99'"),
        ({"dispatch_dtype": "int3"}, "codec must be one of .*, got 'int3'"),
    ],
)
def test_wires_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        Wire(**{"hidden": 8, "num_topk": 2, "num_slots": 4, **options})


def test_what_cannot_be_counted():
    topology = Topology(num_nodes=1, ranks_per_node=2)
    with pytest.raises(ValueError, match="expected the slots of 2 ranks, got 1"):
        node_visits([np.zeros((1, 1), np.int64)], topology, 2)
    with pytest.raises(ValueError, match=r"slot 4 is beyond num_ranks\(2\)"):
        node_visits([np.full((1, 1), 4)] * 2, topology, 2)
    with pytest.raises(ValueError, match='combine "exact" returns a row per'):
        _ = Wire(hidden=8, num_topk=2, num_slots=4, combine="exact").rows
