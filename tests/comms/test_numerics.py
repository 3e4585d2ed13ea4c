"""How far results may be from fp64, and what the codec promises."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from comms.codec import BLOCK, WireFormat, dequantize, quantize
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


@given(hidden=st.integers(1, 400), rows=st.integers(0, 3), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_float8_follows_its_formula(hidden: int, rows: int, seed: int) -> None:
    """Each block alone, element by element, in fp64."""
    generator = torch.Generator().manual_seed(seed)
    scale = 10.0 ** torch.randint(-6, 6, (rows, 1), generator=generator)
    x_RH = torch.randn((rows, hidden), generator=generator) * scale
    q_RH, scales_RB = quantize(x_RH)
    assert q_RH.dtype == torch.float8_e4m3fn
    assert scales_RB.shape == (rows, -(-hidden // BLOCK))
    for r in range(rows):
        for b in range(scales_RB.shape[1]):
            block = x_RH[r, b * BLOCK : (b + 1) * BLOCK]
            amax = max(block.abs().max().item(), 1e-4)
            assert scales_RB[r, b].item() == pytest.approx(amax / 448, rel=1e-6)
            q = q_RH[r, b * BLOCK : (b + 1) * BLOCK].double() * amax / 448
            # 3 mantissa bits: half a step is 1/16 of a normal value, 2^-10 below 2^-6
            bound = torch.maximum(block.double().abs() / 16, torch.tensor(amax / 448 * 2**-10))
            assert ((q - block.double()).abs() <= bound * 1.00001).all()
    again = quantize(dequantize(q_RH, scales_RB, torch.float32))
    assert torch.equal(again[0].view(torch.uint8), q_RH.view(torch.uint8))


def test_float8_error_of_normal_rows() -> None:
    x_RH = torch.randn((50, 7168), generator=torch.Generator().manual_seed(0))
    errors = relative_l2(dequantize(*quantize(x_RH), torch.float32), x_RH.double())
    assert ((errors > 0.0245) & (errors < 0.0275)).all(), errors  # research: 0.0257


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize("float8", [True, False])
@pytest.mark.parametrize(("hidden", "rows"), [(1, 1), (7, 3), (128, 2), (130, 1), (5, 0)])
def test_rows_survive_packing(dtype, float8, hidden, rows) -> None:
    wire = WireFormat(hidden=hidden, num_topk=3, dtype=dtype, float8=float8)
    x_RH = torch.randn(rows, hidden).to(dtype)
    slots_RK = torch.randint(-1, 2**31 - 1, (rows, 3))
    weights_RK = torch.randn(rows, 3)
    packed = wire.pack(x_RH, slots_RK, weights_RK)
    assert packed.shape == (rows, wire.row_bytes)
    assert torch.equal(wire.unpack_slots(packed), slots_RK)
    assert torch.equal(wire.unpack_weights(packed), weights_RK)
    expected = dequantize(*quantize(x_RH), dtype) if float8 else x_RH
    assert torch.equal(wire.unpack_x(packed), expected)


def test_bytes_per_token_of_deepseek_v3() -> None:
    """7168 channels: 7392 bytes of FP8 and scales, 14336 of BF16, plus 8 per top-k entry."""
    sizes = [
        WireFormat(hidden=7168, num_topk=8, dtype=torch.bfloat16, float8=float8).row_bytes
        for float8 in (True, False)
    ]
    assert sizes == [7392 + 64, 14336 + 64]
