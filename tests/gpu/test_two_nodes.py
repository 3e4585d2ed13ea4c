"""Exchange between two GPUs that are a node each, over NCCL: bitwise as the reference, in graphs, late nodes named."""

import os
import time

import pytest
import torch

from comms.group import CommTimeout
from comms.groups import ParallelGroups
from comms.launch import RankPool
from comms.topology import Topology

pytest.importorskip("triton", reason="needs triton (the extra gpu)")

from comms.gpu_dispatcher import connect_dispatcher
from comms.nodes import NodesDispatcher
from comms.symmetric_memory import SymmetricMemory
from comms.symmetric_types import Received
from tests.gpu.nodes_cases import arguments_of, check_nodes, nodes_in_one_process
from tests.gpu.symmetric_cases import Case, inputs_of, outputs_of, same_bits

pytestmark = pytest.mark.usefixtures("both_gpus")

TWO_NODES = Topology(num_nodes=2, ranks_per_node=1)
SHAPE = {"hidden": 1280, "num_topk": 6, "slots_per_rank": 16}  # one, for the sake of compiling
CASES = [
    Case(tokens=(9, 14), dispatch_dtype="float8", **SHAPE),
    Case(tokens=(40, 33), combine="fixed", **SHAPE),
]
ONE_NODE = Topology(num_nodes=1, ranks_per_node=2)


@pytest.fixture
def pool() -> RankPool:
    """Two ranks with a GPU each, new for every test: one changes what they have of NCCL."""
    with RankPool(2) as pool:
        yield pool


def _connected(
    groups: ParallelGroups, case: Case, topology: Topology = TWO_NODES
) -> NodesDispatcher:
    device = torch.device("cuda", groups.rank)
    torch.cuda.set_device(device)
    made = connect_dispatcher(
        topology, case.layout, groups.store, groups.rank, device,
        where=groups.where, timeout_s=20.0,
    )  # fmt: skip
    assert isinstance(made, NodesDispatcher)
    made.expect(max(case.tokens))
    return made


def _exchange(groups: ParallelGroups, case: Case, topology: Topology) -> None:
    dispatcher = _connected(groups, case, topology)
    device, fixed = dispatcher.device, case.combine == "fixed"
    twins = nodes_in_one_process(case, TWO_NODES, device)
    for step in range(case.steps):
        inputs = inputs_of(case, step)
        arguments = arguments_of(inputs[groups.rank], device, fixed)
        received, handle = dispatcher.dispatch(*arguments)
        y_PH, place_RK = (
            x.to(device) for x in outputs_of(received, 10 * step + groups.rank, exact=False)
        )
        out_TH = dispatcher.combine(y_PH, place_RK, handle)
        for twin in twins:
            twin.expect(max(case.tokens))
        wanted = check_nodes(case, TWO_NODES, twins, inputs, device, step)[groups.rank]
        assert same_bits(out_TH, wanted), f"step {step} of rank {groups.rank}"
        # Where counts cross first, rows have other places: outputs that do not depend on these.
        sums = []
        for dispatcher.exact_above in (None, 1):
            received, handle = dispatcher.dispatch(*arguments)
            y_PH = received.x_RH.to(torch.bfloat16).repeat_interleave(case.num_topk, 0)
            sums.append(dispatcher.combine(y_PH, _places(received), handle))
        dispatcher.exact_above = None
        assert same_bits(*sums), f"step {step} of rank {groups.rank}"
        dispatcher.check()
    groups.world.barrier()
    dispatcher.close()


def _places(received: Received) -> torch.Tensor:
    """Of outputs in the order of the rows, K to a row."""
    slots_RK = received.local_slots_RK
    places = torch.arange(slots_RK.numel(), dtype=torch.int32, device=slots_RK.device)
    return torch.where(slots_RK >= 0, places.view(slots_RK.shape), -1)


def _replay(groups: ParallelGroups, case: Case) -> None:
    """A captured layer gives what the same calls give without a graph, for inputs that change."""
    dispatcher = _connected(groups, case)
    device = dispatcher.device
    steps = [arguments_of(inputs_of(case, step)[groups.rank], device, True) for step in range(3)]
    fixed = [part.clone() for part in steps[0]]
    rows = 2 * max(case.tokens) * case.num_topk
    y_PH = torch.randn(rows, case.hidden, device=device).bfloat16()

    def layer() -> torch.Tensor:
        received, handle = dispatcher.dispatch(*fixed)
        return dispatcher.combine(y_PH, _places(received), handle)

    def put(step: int) -> None:
        for part, new in zip(fixed, steps[step], strict=True):
            part.copy_(new)

    wanted = []
    for step in range(3):
        put(step)
        wanted.append(layer().clone())
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        out_TH = layer()
    for i in range(9):
        put(i % 3)
        graph.replay()
        assert same_bits(out_TH, wanted[i % 3]), f"replay {i}"
    assert not same_bits(wanted[0], wanted[1])
    torch.cuda.synchronize()
    assert dispatcher.progress.kernels == 3 * 12
    dispatcher.check()
    groups.world.barrier()
    del graph
    dispatcher.close()


def test_two_nodes_do_as_the_reference_and_graphs_hold_it(pool) -> None:
    for case in CASES:
        pool.run(_exchange, ONE_NODE, case, TWO_NODES, timeout_s=60)
    pool.run(_replay, ONE_NODE, CASES[1], timeout_s=60)


def _without_shared_memory(groups: ParallelGroups, case: Case) -> None:
    os.environ.update(NCCL_P2P_DISABLE="1", NCCL_SHM_DISABLE="1", NCCL_SOCKET_IFNAME="lo")
    if groups.rank == 1:

        def connect(*arguments):
            raise RuntimeError("no peer access")

        SymmetricMemory.connect = connect
    _exchange(groups, case, ONE_NODE)


def test_a_node_whose_gpus_share_no_memory_falls_back_to_nccl_over_sockets(pool) -> None:
    pool.run(_without_shared_memory, ONE_NODE, CASES[1], timeout_s=60)


def _left_alone(groups: ParallelGroups, case: Case, in_graph: bool) -> str:
    """Rank 1 leaves after one exchange; rank 0 is told in time, graph or not."""
    dispatcher = _connected(groups, case)
    arguments = arguments_of(inputs_of(case, 0)[groups.rank], dispatcher.device, True)

    def layer() -> torch.Tensor:
        received, handle = dispatcher.dispatch(*arguments)
        return dispatcher.combine(received.x_RH, received.local_slots_RK, handle)

    layer()  # kernels are compiled: that may take longer than the deadline from here on
    torch.cuda.synchronize()
    dispatcher._watch._timeout_s = 1.5
    graph = torch.cuda.CUDAGraph()
    if in_graph:
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            layer()
    groups.world.barrier()
    if groups.rank == 1:
        groups.world.barrier(timeout_s=20.0)
        return ""
    groups.where.step, groups.where.layer = 12, 3
    start = time.monotonic()
    _ = graph.replay() if in_graph else layer()
    torch.cuda.synchronize()
    seconds = time.monotonic() - start
    assert 1.4 <= seconds < 10, seconds
    try:
        dispatcher.check()
    except CommTimeout as error:
        return str(error)
    finally:
        groups.world.barrier(timeout_s=20.0)
    raise AssertionError("nobody was missed")


def test_a_node_that_does_not_come_is_named_in_graphs_too(pool) -> None:
    for in_graph in (False, True):
        text, _ = pool.run(_left_alone, ONE_NODE, CASES[1], in_graph, timeout_s=60)
        assert "step 12, layer 3" in text
        assert "rank 0 waited 1.5 s in dispatch (exchange 2) for rank 1" in text
