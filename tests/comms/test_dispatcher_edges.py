"""Arguments that cannot be, and entries that must not count."""

import pytest
import torch

from comms.dispatcher import DispatchHandle
from comms.groups import ParallelGroups
from comms.make import DISPATCHERS, make_dispatcher
from comms.topology import Topology
from tests.comms.cases import expert, make_inputs
from tests.comms.thread_world import run_threads

TOPOLOGY = Topology(num_nodes=2, ranks_per_node=2)
ONE = Topology(num_nodes=1, ranks_per_node=1)


def solo(name: str, **options):
    groups = run_threads(lambda groups, _: groups, ONE, [None])[0]
    return make_dispatcher(name, groups, **{"slots_per_rank": 4, "hidden": 8, **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"slots_per_rank": 0}, "slots_per_rank, hidden >= 1, got 0, 8"),
        ({"hidden": 0}, "got 4, 0"),
        ({"dispatch_dtype": "int4"}, "dispatch_dtype must be one of bfloat16, .*, got 'int4'"),
        ({"combine": "fast"}, "combine must be one of node, exact, fixed, got 'fast'"),
    ],
)
@pytest.mark.parametrize("name", DISPATCHERS)
def test_options_that_do_not_exist(name, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        solo(name, **options)


def test_unknown_dispatcher_names_the_known() -> None:
    with pytest.raises(
        ValueError, match=r"\['flat', 'hierarchical', 'low_latency'\], got 'deepep'"
    ):
        solo("deepep")


GOOD = (torch.zeros(2, 8), torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3))


@pytest.mark.parametrize(
    ("position", "bad", "message"),
    [
        (0, torch.zeros(2, 9), r"x_TH must be floats \[T, 8\], got torch.float32 \[2, 9\]"),
        (0, torch.zeros(2, 8, dtype=torch.int64), "x_TH must be floats"),
        (1, torch.zeros(3, 3, dtype=torch.int64), r"slots_TK must be int64 \[2, 3\]"),
        (1, torch.zeros(2, 3, dtype=torch.int32), "slots_TK must be int64"),
        (1, torch.full((2, 3), 4), r"slots must be in \[-1, 4\), got 4..4"),
        (1, torch.full((2, 3), -2), r"slots must be in \[-1, 4\), got -2..-2"),
        (2, torch.zeros(2, 2), r"weights_TK must be fp32 \[2, 3\]"),
        (2, torch.zeros(2, 3, dtype=torch.bfloat16), "weights_TK must be fp32"),
    ],
)
@pytest.mark.parametrize("name", DISPATCHERS)
def test_arguments_that_cannot_be(name, position, bad, message) -> None:
    arguments = [*GOOD]
    arguments[position] = bad
    with pytest.raises(ValueError, match=message):
        solo(name).dispatch(*arguments)


@pytest.mark.parametrize("name", DISPATCHERS)
def test_outputs_that_do_not_fit(name) -> None:
    dispatcher = solo(name)
    _, handle = dispatcher.dispatch(*GOOD)
    with pytest.raises(ValueError, match=r"y_PH must be torch.float32 \[6, 8\]"):
        dispatcher.combine(torch.zeros(5, 8), handle)
    with pytest.raises(ValueError, match="y_PH must be"):
        dispatcher.combine(torch.zeros(6, 8, dtype=torch.bfloat16), handle)
    with pytest.raises(ValueError, match="not a handle of this dispatcher: DispatchHandle"):
        dispatcher.combine(
            torch.zeros(6, 8), DispatchHandle(num_pairs=(6,), weights_TK=GOOD[2], range_T=None)
        )


def alternate(groups: ParallelGroups, task) -> list[torch.Tensor]:
    """Two inputs in turns on one dispatcher; returns every output."""
    name, combine, pair = task
    dispatcher = make_dispatcher(name, groups, slots_per_rank=2, hidden=24, combine=combine)
    outs = []
    for inputs in pair * 3:
        mine = inputs[groups.rank]
        received, handle = dispatcher.dispatch(
            mine.x_TH, mine.slots_TK, mine.weights_TK, mine.range_T
        )
        outs.append(dispatcher.combine(expert(received, groups.rank, 2), handle))
    return outs


@pytest.mark.parametrize("combine", ["node", "exact", "fixed"])
@pytest.mark.parametrize("name", DISPATCHERS)
def test_nothing_leaks_from_one_exchange_into_the_next(rank_pool, name, combine) -> None:
    """The second input is NaN in every token, weight and place that must not count."""
    clean = make_inputs(TOPOLOGY, tokens=[3, 0, 5, 2], slots_per_rank=2)
    dirty = make_inputs(TOPOLOGY, tokens=[6, 4, 0, 1], slots_per_rank=2, seed=1)
    for mine in dirty:
        mine.x_TH.fill_(float("nan"))
    for mine in clean:
        mine.weights_TK[mine.slots_TK < 0] = float("nan")
        mine.range_T.fill_(8.0)
    for outs in rank_pool.run(alternate, TOPOLOGY, (name, combine, [clean, dirty])):
        assert all(torch.isfinite(out).all() for out in outs[0::2])
        assert all(torch.equal(out, outs[0]) for out in outs[2::2])


@pytest.mark.parametrize("name", DISPATCHERS)
def test_a_nan_token_harms_no_other(name) -> None:
    inputs = make_inputs(TOPOLOGY, tokens=[3, 1, 5, 2], slots_per_rank=2)
    before = run_threads(alternate, TOPOLOGY, [(name, "node", [inputs])] * 4)
    inputs[2].x_TH[1] = float("nan")
    after = run_threads(alternate, TOPOLOGY, [(name, "node", [inputs])] * 4)
    for rank in range(4):
        keep = torch.ones(len(inputs[rank].x_TH), dtype=torch.bool)
        if rank == 2:
            keep[1] = False
        assert torch.equal(before[rank][0][keep], after[rank][0][keep])


def within_and_beyond_capacity(groups: ParallelGroups, inputs) -> list[tuple[int, torch.Tensor]]:
    """Rows that the experts get, and the result, of low_latency as it is told what to expect."""
    dispatcher = make_dispatcher("low_latency", groups, slots_per_rank=2, hidden=24, capacity=4)
    mine, answers = inputs[groups.rank], []
    with pytest.raises(ValueError, match="holds 4 tokens a rank, got 5: raise its capacity, or"):
        dispatcher.dispatch(mine.x_TH, mine.slots_TK, mine.weights_TK)
    for expected, tokens in ((5, 5), (4, 4), (None, 4)):
        dispatcher.expect(expected)
        part = [t[:tokens] for t in (mine.x_TH, mine.slots_TK, mine.weights_TK)]
        received, handle = dispatcher.dispatch(*part)
        out_TH = dispatcher.combine(expert(received, groups.rank, 2), handle)
        answers.append((len(received.x_RH), out_TH))
    return answers


def test_low_latency_takes_larger_steps_when_told() -> None:
    inputs = make_inputs(TOPOLOGY, tokens=[5] * 4, slots_per_rank=2)
    expected = run_threads(alternate, TOPOLOGY, [("hierarchical", "node", [inputs])] * 4)
    answers = run_threads(within_and_beyond_capacity, TOPOLOGY, [inputs] * 4)
    for of_rank, outs in zip(answers, expected, strict=True):
        (_, larger_TH), *static = of_rank
        assert torch.equal(larger_TH, outs[0])
        for num_rows, out_TH in static:
            assert num_rows == 4 * 4
            assert torch.equal(out_TH, outs[0][:4])
