"""How far results of dispatch and combine may be from fp64, and which layouts give equal bits."""

import pytest
import torch
from torch import Tensor

from comms.topology import Topology
from tests.comms.cases import Case, exchange_both, make_inputs
from tests.comms.thread_world import run_threads

TWO_BY_TWO = Topology(num_nodes=2, ranks_per_node=2)


def relative_l2(x_TH: Tensor, exact_TH: Tensor) -> Tensor:
    """Per row."""
    return (x_TH.double() - exact_TH).norm(dim=1) / exact_TH.norm(dim=1)


def exact_results(case: Case) -> list[Tensor]:
    """What comes back in exact arithmetic: x times the weighted sum of the slots' gains."""
    results = []
    for mine in case.inputs:
        slots_TK = mine.slots_TK.double()
        gain_TK = 1.0 + 0.37 * slots_TK + 0.01 * slots_TK**2
        factor_T = (gain_TK * mine.weights_TK.double() * (mine.slots_TK >= 0)).sum(dim=1)
        results.append(mine.x_TH.double() * factor_T[:, None])
    return results


def case_of(dtype: torch.dtype, dispatch_dtype: str, combine: str, hidden: int = 1000) -> Case:
    inputs = make_inputs(
        TWO_BY_TWO, tokens=[20, 0, 7, 13], slots_per_rank=4, hidden=hidden, num_topk=6, dtype=dtype
    )
    for mine in inputs:  # every token has a result to compare with
        mine.slots_TK[:, 0] = mine.slots_TK[:, 0].clamp(min=0)
        mine.weights_TK.clamp_(min=0.05)
    return Case(
        topology=TWO_BY_TWO,
        slots_per_rank=4,
        hidden=hidden,
        dispatch_dtype=dispatch_dtype,
        combine=combine,
        inputs=inputs,
        repeats=20,
    )


# Relative L2 per row. fp32: K + ranks additions of half an ulp each. BF16 (8 bits: rounding once
# gives 0.0017 rms): y, then node partials (node mode), then the result. FP8: 0.026 on the way out.
BOUNDS = [
    (torch.float32, "bfloat16", "node", 0.0, 1e-6),
    (torch.float32, "bfloat16", "exact", 0.0, 1e-6),
    (torch.bfloat16, "bfloat16", "exact", 1e-3, 3.5e-3),
    (torch.bfloat16, "bfloat16", "node", 1e-3, 4.5e-3),
    (torch.bfloat16, "float8", "node", 0.02, 0.032),
    (torch.float32, "float8", "exact", 0.02, 0.032),
]


@pytest.mark.parametrize(("dtype", "dispatch_dtype", "combine", "low", "high"), BOUNDS)
def test_error_per_row_against_fp64(dtype, dispatch_dtype, combine, low, high) -> None:
    case = case_of(dtype, dispatch_dtype, combine)
    outcomes = run_threads(exchange_both, TWO_BY_TWO, [case] * 4)
    for mine, exact_TH in zip(outcomes, exact_results(case), strict=True):
        for outcome in mine:
            assert outcome.repeats_equal
            errors_T = relative_l2(outcome.out_TH, exact_TH)
            assert (errors_T <= high).all(), errors_T
            assert (errors_T >= low).all(), errors_T  # an error that small was not rounded


def test_bits_repeat_over_processes(rank_pool) -> None:
    case = case_of(torch.bfloat16, "float8", "node", hidden=40)
    threads = run_threads(exchange_both, TWO_BY_TWO, [case] * 4)
    processes = rank_pool.run(exchange_both, TWO_BY_TWO, case)
    for by_thread, by_process in zip(threads, processes, strict=True):
        for one, other in zip(by_thread, by_process, strict=True):
            assert one.repeats_equal
            assert other.repeats_equal
            assert torch.equal(one.out_TH, other.out_TH)


@pytest.mark.parametrize("nodes_ranks", [(1, 4), (4, 1), (2, 2), (1, 2)])
def test_exact_combine_is_the_same_in_every_layout(nodes_ranks) -> None:
    """Same tokens, same global slots on other ranks and nodes: the same bits."""
    total_slots, results = 16, []
    everything = make_inputs(
        Topology(num_nodes=1, ranks_per_node=1), tokens=[12], slots_per_rank=total_slots, num_topk=4
    )[0]
    for nodes, ranks in ((1, 1), nodes_ranks):
        topology = Topology(num_nodes=nodes, ranks_per_node=ranks)
        world = topology.world_size
        pieces = [torch.tensor_split(t, world) for t in vars(everything).values()]
        inputs = tuple(
            type(everything)(x_TH=x, slots_TK=s, weights_TK=w)
            for x, s, w in zip(*pieces, strict=True)
        )
        case = Case(
            topology=topology,
            slots_per_rank=total_slots // world,
            hidden=24,
            dispatch_dtype="float8",
            combine="exact",
            inputs=inputs,
        )
        outcomes = run_threads(exchange_both, topology, [case] * world)
        results.append(torch.cat([hierarchical.out_TH for _, hierarchical in outcomes]))
    assert results[0].abs().sum() > 0
    assert torch.equal(results[0], results[1])
