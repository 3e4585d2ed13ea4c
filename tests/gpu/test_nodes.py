"""Exchange between nodes of one process, whose rails copy: bitwise as the reference."""

import ctypes

import pytest
import torch

from comms.store import host_store
from comms.topology import Topology

pytest.importorskip("triton", reason="needs triton (the extra gpu)")

from comms.gpu_dispatcher import connect_dispatcher
from comms.nodes import NodesDispatcher
from comms.rail_record import RailRecord
from tests.gpu.nodes_cases import nodes_in_one_process, run_nodes
from tests.gpu.symmetric_cases import Case, dispatchers_in_one_process

TWO_NODES = Topology(num_nodes=2, ranks_per_node=1)
TWO_BY_TWO = Topology(num_nodes=2, ranks_per_node=2)
THREE_BY_TWO = Topology(num_nodes=3, ranks_per_node=2)
FOUR_BY_ONE = Topology(num_nodes=4, ranks_per_node=1)
SHAPE = {"hidden": 1280, "num_topk": 6, "slots_per_rank": 16}  # one, for the sake of compiling
SIX = Case(tokens=(33, 64, 1, 0, 12, 70), **SHAPE)
FOUR = Case(tokens=(157, 200, 140, 20), dispatch_dtype="float8", **SHAPE)
FIXED = Case(tokens=(9, 14, 3, 8), dispatch_dtype="float8", combine="fixed", **SHAPE)
CASES = [
    (SIX, THREE_BY_TWO, None),
    (SIX, THREE_BY_TWO, 1),
    (FOUR, FOUR_BY_ONE, None),
    (FIXED, TWO_BY_TWO, None),
    (FIXED, TWO_BY_TWO, 1),
]


def test_interpreted_kernels_do_as_the_reference(interpreted) -> None:
    interpreted("tests.gpu.nodes_cases:interpreted_cases")


@pytest.mark.parametrize(("case", "topology", "exact_above"), CASES, ids=str)
def test_every_bit_is_the_references(cuda, case, topology, exact_above) -> None:
    run_nodes(case, topology, cuda, exact_above)


def test_records_are_whole_words_of_16_bytes() -> None:
    layout = Case(
        tokens=(1,), hidden=384, num_topk=5, dispatch_dtype="float8", combine="fixed"
    ).layout
    record = RailRecord(layout)
    assert (record.scales_at, record.slots_at, record.words) == (96, 99, 112)
    assert record.sum_columns == 388


def test_layouts_of_one_node_are_refused() -> None:
    case = Case(tokens=(3, 3))
    dispatcher = nodes_in_one_process(
        case, Topology(num_nodes=2, ranks_per_node=1), torch.device("cpu")
    )[0]
    with pytest.raises(ValueError, match="room for 4 tokens a rank, expected 5"):
        dispatcher.expect(5)
    alone = dispatchers_in_one_process(case.layout, torch.device("cpu"))[0]
    with pytest.raises(ValueError, match="of_several"):
        NodesDispatcher(alone, dispatcher.rail)


def test_nodes_without_nccl_are_told_so() -> None:
    try:
        ctypes.CDLL("libnccl.so.2")
        pytest.skip("there is NCCL")
    except OSError:
        store, _ = host_store()
    layout = Case(tokens=(3, 3)).layout
    with pytest.raises(RuntimeError, match=r"NCCL .* was not found"):
        connect_dispatcher(TWO_NODES, layout, store, 0, torch.device("cpu"))
