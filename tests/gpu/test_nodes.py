"""Exchange between nodes: bitwise as the reference over copied rails and over NCCL, late nodes named."""

import ctypes
import os
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from comms.group import CommTimeout
from comms.groups import ParallelGroups
from comms.launch import RankPool
from comms.store import connect_store, host_store
from comms.topology import Topology

pytest.importorskip("triton", reason="needs triton (the extra gpu)")

from comms.gpu_dispatcher import connect_dispatcher
from comms.kernels.signals import LATE, ROWS_BITS
from comms.meeting import meet
from comms.nodes import NodesDispatcher
from comms.rail_record import RailRecord
from comms.rail_watch import Progress, RailWatch
from comms.symmetric_memory import SymmetricMemory
from comms.symmetric_report import Report
from comms.symmetric_types import Received
from comms.where import Where
from tests.gpu.nodes_cases import (
    arguments_of,
    check_nodes,
    nodes_in_one_process,
    run_nodes,
)
from tests.gpu.symmetric_cases import (
    Case,
    dispatchers_in_one_process,
    inputs_of,
    outputs_of,
    same_bits,
)

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
PAIR = [
    Case(tokens=(9, 14), dispatch_dtype="float8", **SHAPE),
    Case(tokens=(40, 33), combine="fixed", **SHAPE),
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


# -- deadlines -----------------------------------------------------------------------------------


def _watch(progress: Progress, store, idx: int, aborted: list[int]) -> RailWatch:
    return RailWatch(
        progress, store, idx, (4, 5, 6), Where(step=12, layer=3), name="rail1", timeout_s=0.4,
        abort=lambda: aborted.append(idx),
    )  # fmt: skip


def test_whoever_is_late_on_a_rail_is_named_by_all_that_wait() -> None:
    store, _ = host_store()
    told: list[Progress] = [Progress(torch.device("cpu")) for _ in range(3)]
    aborted: list[int] = []
    watches = [_watch(progress, store, idx, aborted) for idx, progress in enumerate(told)]
    told[0].told[0] = 7  # in the dispatch of the third exchange
    time.sleep(0.1)
    told[2].told[0] = 7
    told[1].told[0] = 6  # between two exchanges, for as long as it likes
    deadline = time.monotonic() + 5
    while len(aborted) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    for idx, rank in ((0, 4), (2, 6)):
        with pytest.raises(
            CommTimeout,
            match=rf"step 12, layer 3.*rank {rank} waited 0.4 s in dispatch \(exchange 3\) for rank 5$",
        ):
            watches[idx].check()
    watches[1].check()
    assert sorted(aborted) == [0, 2]
    for watch in watches:
        watch.close()


def test_an_exchange_that_goes_on_is_not_late() -> None:
    store, _ = host_store()
    progress, aborted = Progress(torch.device("cpu")), []
    watch = _watch(progress, store, 0, aborted)
    for kernels in (1, 2, 4, 5, 7, 8):
        progress.told[0] = kernels
        time.sleep(0.2)
    watch.check()
    watch.close()
    assert not aborted


def test_late_ranks_of_a_node_have_their_names_in_the_world() -> None:
    report = Report(1, (4, 5), torch.device("cpu"), Where(), 1.0)
    report.check(8)
    report.lines[0, 0] = torch.tensor([LATE, 7, 6 << ROWS_BITS, 0])
    with pytest.raises(CommTimeout, match=r"rank 5 waited 1 s in dispatch .signal 7.* for rank 4$"):
        report.check(8)


def test_members_that_do_not_come_are_named() -> None:
    store, address = host_store()
    with pytest.raises(CommTimeout, match=r"rank 5 waited 0.2 s in connect for rank 4, rank 6$"):
        meet(store, 5, (4, 5, 6), name="rail1", timeout_s=0.2)

    def words(rank: int) -> list[str]:
        return meet(connect_store(address), rank, (0, 1), f"{rank}", name="rail0", timeout_s=5)

    with ThreadPoolExecutor() as threads:
        assert list(threads.map(words, (0, 1))) == [["0", "1"]] * 2


def test_nodes_without_nccl_are_told_so() -> None:
    try:
        ctypes.CDLL("libnccl.so.2")
        pytest.skip("there is NCCL")
    except OSError:
        store, _ = host_store()
    layout = Case(tokens=(3, 3)).layout
    with pytest.raises(RuntimeError, match=r"NCCL .* was not found"):
        connect_dispatcher(TWO_NODES, layout, store, 0, torch.device("cpu"))


# -- between processes ---------------------------------------------------------------------------

ONE_NODE = Topology(num_nodes=1, ranks_per_node=2)


@pytest.fixture
def pool(both_gpus) -> RankPool:
    """Two ranks with a GPU each."""
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
    for case in PAIR:
        pool.run(_exchange, ONE_NODE, case, TWO_NODES, timeout_s=60)
    pool.run(_replay, ONE_NODE, PAIR[1], timeout_s=60)


def _without_shared_memory(groups: ParallelGroups, case: Case) -> None:
    os.environ.update(NCCL_P2P_DISABLE="1", NCCL_SHM_DISABLE="1", NCCL_SOCKET_IFNAME="lo")
    if groups.rank == 1:

        def connect(*arguments):
            raise RuntimeError("no peer access")

        SymmetricMemory.connect = connect
    _exchange(groups, case, ONE_NODE)


def test_a_node_whose_gpus_share_no_memory_falls_back_to_nccl_over_sockets(pool) -> None:
    pool.run(_without_shared_memory, ONE_NODE, PAIR[1], timeout_s=60)


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
        text, _ = pool.run(_left_alone, ONE_NODE, PAIR[1], in_graph, timeout_s=60)
        assert "step 12, layer 3" in text
        assert "rank 0 waited 1.5 s in dispatch (exchange 2) for rank 1" in text
