"""How far results of dispatch and combine may be from fp64, and which layouts give equal bits."""

import pytest
import torch
from torch import Tensor

from comms.topology import Topology
from tests.comms.cases import WAYS, Case, equal, exchange_all, make_inputs
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


def case_of(
    dtype: torch.dtype, dispatch_dtype: str, combine: str, carrier: str, hidden: int = 1000
) -> Case:
    inputs = make_inputs(
        TWO_BY_TWO, tokens=[20, 0, 7, 13], slots_per_rank=4, hidden=hidden, num_topk=6, dtype=dtype
    )
    for mine in inputs:  # every token has a result to compare with
        mine.slots_TK[:, 0] = mine.slots_TK[:, 0].clamp(min=0)
        mine.weights_TK.clamp_(min=0.05)
        mine.range_T.fill_(64.0)  # outputs are of size 5 to 30
    return Case(
        topology=TWO_BY_TWO,
        slots_per_rank=4,
        hidden=hidden,
        dispatch_dtype=dispatch_dtype,
        combine=combine,
        combine_dtype=carrier,
        inputs=inputs,
        repeats=20,
    )


# Relative L2 per row. fp32: K + ranks additions of half an ulp each. BF16 (8 bits: rounding once
# gives 0.0017 rms): y, then node partials (node mode), then the result. FP8: 0.026 on the way out.
# Compressed partials: what `codecs.py` says of them, on top of BF16's own roundings.
BOUNDS = [
    (torch.float32, "bfloat16", "node", "bfloat16", 0.0, 1e-6),
    (torch.float32, "bfloat16", "exact", "bfloat16", 0.0, 1e-6),
    (torch.float32, "bfloat16", "fixed", "bfloat16", 0.0, 1e-5),
    (torch.bfloat16, "bfloat16", "exact", "bfloat16", 1e-3, 3.5e-3),
    (torch.bfloat16, "bfloat16", "fixed", "bfloat16", 1e-3, 3.5e-3),
    (torch.bfloat16, "bfloat16", "node", "bfloat16", 1e-3, 4.5e-3),
    (torch.bfloat16, "bfloat16", "node", "int10", 1e-3, 4.5e-3),
    (torch.bfloat16, "bfloat16", "node", "logfmt10", 2e-3, 6e-3),
    (torch.bfloat16, "bfloat16", "node", "int8", 4e-3, 1e-2),
    (torch.bfloat16, "bfloat16", "node", "float8", 0.015, 0.04),
    (torch.bfloat16, "int8", "node", "bfloat16", 4e-3, 1e-2),
    (torch.bfloat16, "float8", "node", "bfloat16", 0.02, 0.032),
    (torch.float32, "float8", "exact", "bfloat16", 0.02, 0.032),
]


@pytest.mark.parametrize(("dtype", "dispatch_dtype", "combine", "carrier", "low", "high"), BOUNDS)
def test_error_per_row_against_fp64(dtype, dispatch_dtype, combine, carrier, low, high) -> None:
    case = case_of(dtype, dispatch_dtype, combine, carrier)
    outcomes = run_threads(exchange_all, TWO_BY_TWO, [case] * 4)
    for mine, exact_TH in zip(outcomes, exact_results(case), strict=True):
        for outcome in mine.values():
            assert outcome.repeats_equal
            errors_T = relative_l2(outcome.out_TH, exact_TH)
            assert (errors_T <= high).all(), errors_T
            assert (errors_T >= low).all(), errors_T  # an error that small was not rounded


def test_bits_repeat_over_processes(rank_pool) -> None:
    case = case_of(torch.bfloat16, "float8", "node", "logfmt10", hidden=40)
    threads = run_threads(exchange_all, TWO_BY_TWO, [case] * 4)
    processes = rank_pool.run(exchange_all, TWO_BY_TWO, case)
    for by_thread, by_process in zip(threads, processes, strict=True):
        for way, one in by_thread.items():
            other = by_process[way]
            assert one.repeats_equal
            assert other.repeats_equal
            assert torch.equal(one.out_TH, other.out_TH)


@pytest.mark.parametrize("combine", ["exact", "fixed"])
@pytest.mark.parametrize("nodes_ranks", [(1, 4), (4, 1), (2, 2), (1, 2)])
def test_exact_and_fixed_combine_are_the_same_in_every_layout(nodes_ranks, combine) -> None:
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
            type(everything)(x_TH=x, slots_TK=s, weights_TK=w, range_T=r)
            for x, s, w, r in zip(*pieces, strict=True)
        )
        case = Case(
            topology=topology,
            slots_per_rank=total_slots // world,
            hidden=24,
            dispatch_dtype="float8",
            combine=combine,
            inputs=inputs,
        )
        outcomes = run_threads(exchange_all, topology, [case] * world)
        for way in WAYS:
            results.append(torch.cat([ways[way].out_TH for ways in outcomes]))
    assert results[0].nan_to_num(0).abs().sum() > 0
    assert all(equal(out, results[0]) for out in results)
