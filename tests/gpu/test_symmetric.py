"""Exchange over memory that GPUs share: bitwise as the reference, late peers named, graphs replayed."""

import time
from itertools import pairwise

import pytest
import torch

from comms.group import CommError, CommTimeout
from comms.groups import ParallelGroups
from comms.launch import RankPool
from comms.topology import Topology

pytest.importorskip("triton", reason="needs triton (the extra gpu)")

from comms.symmetric import SymmetricDispatcher
from comms.symmetric_layout import SymmetricLayout
from comms.symmetric_memory import SymmetricMemory
from comms.symmetric_tiles import Tiles
from tests.gpu.symmetric_cases import (
    Case,
    check_step,
    dispatchers_in_one_process,
    inputs_of,
    outputs_of,
    run_case,
    same_bits,
)

CASES = [
    Case(tokens=(7, 5)),
    Case(tokens=(33, 64, 1, 0), hidden=1408 - 128, num_topk=6, slots_per_rank=16, expected=70),
    Case(tokens=(9, 14), hidden=7168, num_topk=8, slots_per_rank=128, dispatch_dtype="float8"),
    Case(tokens=(8, 0), hidden=7168, num_topk=8, slots_per_rank=128, combine="fixed", steps=2),
    Case(tokens=(6,), hidden=2048, num_topk=6, combine="fixed", slots_per_rank=32),
    Case(tokens=(200, 157), hidden=384, num_topk=4, combine="fixed", dispatch_dtype="float8"),
    Case(tokens=(157, 200), hidden=2176, num_topk=4),
]


def test_interpreted_kernels_do_as_the_reference(interpreted) -> None:
    interpreted("tests.gpu.symmetric_cases:interpreted_cases")


@pytest.mark.parametrize(
    ("case", "programs"),
    [*((case, None) for case in CASES), (CASES[0], 3), (CASES[-2], 3), (CASES[-1], 1024)],
    ids=str,
)
def test_every_bit_is_the_references(cuda, case, programs) -> None:
    run_case(case, cuda, programs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": 100}, "hidden must be a multiple of 128, got 100"),
        ({"dispatch_dtype": "int8"}, "must be bfloat16 or float8, got 'int8'"),
        ({"combine": "exact"}, "must be node or fixed, got 'exact'"),
        ({"capacity": 0}, "1 <= capacity"),
    ],
)
def test_layouts_that_cannot_be(change, message) -> None:
    options = {"world_size": 2, "slots_per_rank": 4, "hidden": 256, "num_topk": 2, "capacity": 8}
    with pytest.raises(ValueError, match=message):
        SymmetricLayout(**options | change)


def test_regions_do_not_overlap_and_start_where_16_bytes_go_at_once() -> None:
    layout = SymmetricLayout(
        world_size=3, slots_per_rank=4, hidden=384, num_topk=5, capacity=7,
        dispatch_dtype="float8", combine="fixed",
    )  # fmt: skip
    starts = [*layout.offsets(0), *layout.offsets(1), layout.num_bytes]
    sizes = layout.region_bytes * 2
    assert all(start % 128 == 0 for start in starts)
    assert [b - a for a, b in pairwise(starts)] == list(sizes)
    assert sizes[0] == 3 * 7 * 384
    assert sizes[6] == 3 * 7 * 384 * 4


@pytest.mark.parametrize("combine", ["node", "fixed"])
@pytest.mark.parametrize("hidden", [256, 2048, 7168])
@pytest.mark.parametrize("programs", [None, 1, 24, 5000])
def test_programs_have_all_units_among_them(combine, hidden, programs) -> None:
    layout = SymmetricLayout(
        world_size=2, slots_per_rank=4, hidden=hidden, num_topk=2, capacity=9000, combine=combine
    )
    tiles = Tiles(layout, 132, programs)
    for num_rows in (1, 7, 132, 133, 500, 4096, 9000):
        for tile in (tiles.dispatch(num_rows), tiles.combine(num_rows)):
            units = num_rows * -(-hidden // tile.channels)
            assert 1 <= tile.programs <= min(units, 1024, programs or 1024)
            assert (tile.rounds - 1) * tile.programs < units <= tile.rounds * tile.programs
            assert tile.chunk >= 1
        assert combine == "node" or tiles.combine(num_rows).channels >= hidden


def test_arguments_that_cannot_be() -> None:
    layout = SymmetricLayout(
        world_size=1, slots_per_rank=4, hidden=256, num_topk=2, capacity=8, combine="fixed"
    )
    (ranks,) = dispatchers_in_one_process(layout, torch.device("cpu"))
    x_TH, slots_TK = torch.zeros(9, 256, dtype=torch.bfloat16), torch.zeros(9, 2, dtype=torch.int64)
    weights_TK, range_T = torch.zeros(9, 2), torch.ones(9)
    with pytest.raises(ValueError, match="expected at most 8 tokens a rank, got 9"):
        ranks.start_dispatch(x_TH, slots_TK, weights_TK, range_T)
    with pytest.raises(ValueError, match="x_TH must be contiguous bfloat16"):
        ranks.start_dispatch(x_TH.float(), slots_TK, weights_TK, range_T)
    with pytest.raises(ValueError, match="needs range_T"):
        ranks.start_dispatch(x_TH[:8], slots_TK[:8], weights_TK[:8])
    with pytest.raises(ValueError, match="slots_TK must be contiguous int32 or int64"):
        ranks.start_dispatch(x_TH[:8], slots_TK[:7], weights_TK[:8], range_T[:8])
    with pytest.raises(ValueError, match="room for 8 tokens a rank, expected 9"):
        ranks.expect(9)
    memory = SymmetricMemory.in_one_process(2, layout.num_bytes, torch.device("cpu"))[0]
    with pytest.raises(ValueError, match="does not fit memory of 2 ranks"):
        SymmetricDispatcher(layout, memory)


def test_a_peer_that_does_not_come_is_named_once_the_host_looks(cuda) -> None:
    case = Case(tokens=(6, 6))
    source = inputs_of(case, 0)[0]
    arguments = (source.x_TH.to(cuda), source.slots_TK.to(cuda), source.weights_TK.to(cuda))
    for _ in range(2):  # the first time kernels are compiled
        memory = SymmetricMemory.in_one_process(2, case.layout.num_bytes, cuda)[0]
        alone = SymmetricDispatcher(case.layout, memory, timeout_s=0.2)
        alone.where.step, alone.where.layer = 12, 3
        torch.cuda.synchronize()
        start = time.monotonic()
        for _ in range(3):  # on their way before the first is late
            received, handle = alone.dispatch(*arguments)
        torch.cuda.synchronize()
        seconds = time.monotonic() - start
    assert 0.2 <= seconds < 0.35  # after the first failure nobody waits
    with pytest.raises(
        CommTimeout, match=r"step 12, layer 3.*rank 0 waited 0.2 s in dispatch.*rank 1"
    ):
        alone.check()
    with pytest.raises(CommTimeout):
        alone.dispatch(*arguments)
    with pytest.raises(CommTimeout):
        alone.combine(received.x_RH, None, handle)


def test_ranks_that_expect_different_numbers_of_tokens_are_told(cuda) -> None:
    case = Case(tokens=(6, 6))
    ranks = dispatchers_in_one_process(case.layout, cuda)
    ranks[1].expect(5)
    pending = [
        dispatcher.start_dispatch(
            source.x_TH[:5].to(cuda), source.slots_TK[:5].to(cuda), source.weights_TK[:5].to(cuda)
        )
        for dispatcher, source in zip(ranks, inputs_of(case, 0), strict=True)
    ]
    for part in pending:
        part.wait()
    torch.cuda.synchronize()
    with pytest.raises(CommError, match="expected 7 rows of rank 1 in dispatch, which sent 5"):
        ranks[0].check()


def test_a_shared_expert_is_added_as_bfloat16(cuda) -> None:
    case = Case(tokens=(40,), hidden=512)
    (dispatcher,) = dispatchers_in_one_process(case.layout, cuda)
    source = inputs_of(case, 0)[0]
    received, handle = dispatcher.dispatch(
        source.x_TH.to(cuda), source.slots_TK.to(cuda), source.weights_TK.to(cuda)
    )
    y_PH, place_RK = (x.to(cuda) for x in outputs_of(received, 0, exact=False))
    plain_TH = dispatcher.combine(y_PH, place_RK, handle)
    extra_TH = torch.randn(40, 512, device=cuda).bfloat16()
    both_TH = dispatcher.start_combine(y_PH, place_RK, handle).wait(extra_TH)
    assert same_bits(both_TH, plain_TH + extra_TH)


def test_a_graph_is_replayed_with_other_inputs(cuda) -> None:
    """Nothing that a replay does depends on what was there when it was captured."""
    case = Case(tokens=(33, 33), hidden=1024, num_topk=4, dispatch_dtype="float8", combine="fixed")
    ranks = dispatchers_in_one_process(case.layout, cuda)
    for dispatcher in ranks:
        dispatcher.expect(33)
    steps = [[_on(x, cuda) for x in inputs_of(case, step)] for step in range(4)]
    fixed = [[part.clone() for part in rank] for rank in steps[0]]
    y_PH = torch.randn(2 * 33 * 4, 1024, device=cuda).bfloat16()
    place_RK = torch.arange(2 * 33 * 4, dtype=torch.int32, device=cuda).view(-1, 4)

    def layer() -> list[torch.Tensor]:
        pending = [d.start_dispatch(*parts) for d, parts in zip(ranks, fixed, strict=True)]
        received = [part.wait() for part in pending]
        places = [torch.where(x.local_slots_RK >= 0, place_RK, -1) for x in received]
        home = [
            d.start_combine(y_PH, here, part.handle)
            for d, here, part in zip(ranks, places, pending, strict=True)
        ]
        return [part.wait() for part in home]

    wanted = []
    for step in steps:
        for parts, new in zip(fixed, step, strict=True):
            _overwrite(parts, new)
        wanted.append([x.clone() for x in layer()])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = layer()
    once = [dispatcher.bytes_sent["intra_node"] for dispatcher in ranks]
    for i, step in enumerate(steps * 2):
        for parts, new in zip(fixed, step, strict=True):
            _overwrite(parts, new)
        graph.replay()
        assert all(same_bits(a, b) for a, b in zip(outputs, wanted[i % 4], strict=True))
    assert not same_bits(wanted[0][0], wanted[1][0])
    ranks[0].check()
    for dispatcher, num_bytes in zip(ranks, once, strict=True):
        assert dispatcher.bytes_sent["intra_node"] == 3 * num_bytes > 0


def _on(x, device) -> list[torch.Tensor]:
    return [part.to(device) for part in (x.x_TH, x.slots_TK, x.weights_TK, x.range_T)]


def _overwrite(parts: list[torch.Tensor], new: list[torch.Tensor]) -> None:
    for part, values in zip(parts, new, strict=True):
        part.copy_(values)


# -- between processes ---------------------------------------------------------------------------


def _exchange(groups: ParallelGroups, case: Case) -> None:
    """Each rank plays its part, then all compare what they found with the reference."""
    device = torch.device("cuda", groups.rank)
    torch.cuda.set_device(device)
    dispatcher = SymmetricDispatcher.connect(
        case.layout, groups.store, groups.rank, device, timeout_s=20.0
    )
    dispatcher.expect(case.expected or max(case.tokens))
    fixed = case.combine == "fixed"
    twins = dispatchers_in_one_process(case.layout, device)
    for step in range(case.steps):
        inputs = inputs_of(case, step)
        mine = inputs[groups.rank]
        range_T = mine.range_T.to(device) if fixed else None
        received, handle = dispatcher.dispatch(
            mine.x_TH.to(device), mine.slots_TK.to(device), mine.weights_TK.to(device), range_T
        )
        y_PH, place_RK = (
            x.to(device) for x in outputs_of(received, 10 * step + groups.rank, exact=False)
        )
        out_TH = dispatcher.combine(y_PH, place_RK, handle)
        wanted = _in_one_process(twins, case, step, device)[groups.rank]
        assert same_bits(out_TH, wanted), f"step {step} of rank {groups.rank}"
        dispatcher.check()
    assert dispatcher.bytes_sent == twins[groups.rank].bytes_sent
    dispatcher.forget_bytes()
    assert dispatcher.bytes_sent == {"intra_node": 0}
    groups.world.barrier()


def _in_one_process(ranks, case: Case, step: int, device) -> list[torch.Tensor]:
    """The sums of all ranks, which `check_step` has compared with the reference."""
    for dispatcher in ranks:
        dispatcher.expect(case.expected or max(case.tokens))
    return check_step(case, ranks, inputs_of(case, step), device, step)


@pytest.mark.parametrize(
    "case", CASES[2:4], ids=lambda case: f"{case.dispatch_dtype}-{case.combine}"
)
@pytest.mark.usefixtures("both_gpus")
def test_two_gpus_do_as_the_reference(case) -> None:
    with RankPool(2) as pool:
        pool.run(_exchange, Topology(num_nodes=1, ranks_per_node=2), case)
