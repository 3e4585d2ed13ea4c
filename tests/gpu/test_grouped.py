"""The experts' grouped products: right, and the same bits whatever a row's company.

On a CPU Triton's interpreter runs them. It cuts bfloat16 off instead of rounding it and halves some
values just below a power of two when it makes e4m3 of them, hence its wide bounds.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from experts.kernels.types import BLOCK, QuantizedRows
from tests.gpu.grouped_cases import (
    FP8,
    Case,
    quantized,
    random_rows,
    sorted_pairs,
    worst_error,
)

BOUNDS = {"bfloat16": 0.01, "w8a8": 0.04, "w16a8": 0.01}  # of the worst row; the median has half
V2_LITE, MOSAIC = (2048, 1408), (256, 64)


def _case(mode: str, num_slots: int, sizes: tuple[int, int], device: str = "cuda") -> Case:
    dtype = torch.bfloat16 if mode == "bfloat16" else FP8
    return Case.random(dtype, num_slots, *sizes, device)


def interpreted_errors() -> None:
    """Ragged counts, an empty slot, pairs that are not here: run by `test_interpreted`."""
    from experts.kernels.grouped import expert_ffn

    torch.manual_seed(0)
    slots_RK = torch.randint(-1, 3, (9, 2))
    slots_RK[slots_RK == 1] = 2
    pairs = sorted_pairs(slots_RK, 3)
    for mode, sizes, bound in (
        ("bfloat16", MOSAIC, 0.03),
        ("w8a8", (256, 128), 0.15),
        ("w16a8", (256, 128), 0.03),
    ):
        case = _case(mode, 3, sizes, "cpu")
        x_RH = random_rows(9, sizes[0], "cpu")
        x = quantized(x_RH) if mode == "w8a8" else x_RH
        expected = case.expected(x, pairs)
        y_PH = expert_ffn(x, pairs, case.experts)
        error = worst_error(y_PH[: len(expected)], expected)
        assert error < bound, f"{mode}: {error}"


def test_interpreted(interpreted) -> None:
    interpreted("tests.gpu.test_grouped:interpreted_errors")


def test_operands_that_do_not_fit_are_refused() -> None:
    pytest.importorskip("triton", reason="needs triton (the extra gpu)")
    from experts.kernels.grouped import expert_ffn

    case = _case("bfloat16", 2, MOSAIC, "cpu")
    pairs = sorted_pairs(torch.zeros(3, 2, dtype=torch.int64), 2)
    with pytest.raises(ValueError, match="rows of 128 channels for experts of hidden\\(256\\)"):
        expert_ffn(torch.zeros(3, 128, dtype=torch.bfloat16), pairs, case.experts)
    with pytest.raises(ValueError, match="not quantised"):
        expert_ffn(quantized(torch.zeros(3, 256)), pairs, case.experts)


def test_nan_bytes_are_refused() -> None:
    pytest.importorskip("triton", reason="needs triton (the extra gpu)")
    from experts.kernels.dequantise import check_finite

    weights = torch.randn(4, BLOCK).to(FP8)
    check_finite(weights)
    weights.view(torch.uint8)[1, 5] = 0xFF
    with pytest.raises(ValueError, match=r"w2: 1 of 512 e4m3 bytes are NaN"):
        check_finite(weights, "w2")


def test_no_rows() -> None:
    pytest.importorskip("triton", reason="needs triton (the extra gpu)")
    from experts.kernels.grouped import expert_ffn

    case = _case("bfloat16", 2, MOSAIC, "cpu")
    pairs = sorted_pairs(torch.zeros(0, 2, dtype=torch.int64), 2)
    assert expert_ffn(torch.zeros(0, 256).bfloat16(), pairs, case.experts).shape == (0, 256)


def test_bench_needs_a_gpu(capsys) -> None:
    pytest.importorskip("rich", reason="needs the project's command line")
    from deploy.bench.experts import experts_command

    assert experts_command("cpu", 256, 128, [], None) == 2
    assert experts_command("cuda", 256, 128, ["int3"], None) == 2
    if not torch.cuda.is_available():
        assert experts_command("cuda", 256, 128, [], None) == 1
        assert "needs a CUDA GPU" in capsys.readouterr().err


@pytest.mark.parametrize("mode", BOUNDS)
@pytest.mark.parametrize("sizes", [(7168, 2048), V2_LITE, MOSAIC], ids=str)
def test_against_fp64(cuda, mode: str, sizes: tuple[int, int]) -> None:
    from experts.kernels.grouped import expert_ffn

    if mode != "bfloat16" and sizes[1] % BLOCK:
        pytest.skip("FP8 needs whole blocks of channels")
    torch.manual_seed(1)
    case = _case(mode, 5, sizes)
    for num_rows in (1, 7, 200, 700):
        slots_RK = torch.randint(-1, 5, (num_rows, 3), device=cuda)
        slots_RK[slots_RK == 2] = 3
        slots_RK[0] = 4
        pairs = sorted_pairs(slots_RK, 5)
        x_RH = random_rows(num_rows, sizes[0], "cuda")
        x = quantized(x_RH) if mode == "w8a8" else x_RH
        expected = case.expected(x, pairs)
        y_PH = expert_ffn(x, pairs, case.experts)
        assert worst_error(y_PH[: len(expected)], expected) < BOUNDS[mode]


@pytest.mark.parametrize("mode", BOUNDS)
def test_a_row_does_not_depend_on_its_company(cuda, mode: str) -> None:
    """Alone, among few, among many: the same bits, from every tile that is ever chosen."""
    from experts.kernels.grouped import expert_ffn

    torch.manual_seed(2)
    case = _case(mode, 3, V2_LITE)
    x_RH = random_rows(1500, V2_LITE[0], "cuda")
    slots_R1 = torch.randint(0, 3, (1500, 1), device=cuda)
    answers = []
    for num_rows in (1500, 900, 260, 130, 70, 20, 5):
        chosen = torch.randperm(1500, device=cuda)[:num_rows]
        chosen[torch.randint(num_rows, ())] = 17  # the row that is always there
        pairs = sorted_pairs(slots_R1[chosen], 3)
        x = quantized(x_RH[chosen]) if mode == "w8a8" else x_RH[chosen]
        y_PH = expert_ffn(x, pairs, case.experts)
        answers.append(y_PH[pairs.place_RK[chosen == 17][0, 0].long()])
    for answer in answers[1:]:
        assert torch.equal(answer, answers[0])


@pytest.mark.parametrize("mode", BOUNDS)
def test_captured_once_for_any_counts_and_buffers(cuda, mode: str) -> None:
    """A CUDA graph: new rows, new counts, an expert that moved to the spare buffer."""
    from experts.kernels.grouped import expert_ffn

    torch.manual_seed(3)
    num_rows, num_slots = 96, 4
    case = _case(mode, num_slots, V2_LITE)
    x_RH = random_rows(num_rows, V2_LITE[0], "cuda")
    x: torch.Tensor | QuantizedRows = quantized(x_RH) if mode == "w8a8" else x_RH
    pairs = sorted_pairs(torch.randint(0, num_slots, (num_rows, 2), device=cuda), num_slots)
    expert_ffn(x, pairs, case.experts)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y_PH = expert_ffn(x, pairs, case.experts)
    for most in (3, num_slots, 1):
        new = sorted_pairs(torch.randint(-1, most, (num_rows, 2), device=cuda), num_slots)
        pairs.pair_P.copy_(new.pair_P)
        pairs.ends_S.copy_(new.ends_S)
        case.experts.buffer_S.copy_(torch.randperm(num_slots + 2)[:num_slots])
        y_PH.fill_(torch.nan)
        graph.replay()
        expected = case.expected(x, new)
        assert worst_error(y_PH[: len(expected)], expected) < BOUNDS[mode]
        assert y_PH[len(expected) :].isnan().all()  # nobody wrote beyond the last pair


def test_a_row_of_nan_spoils_no_other(cuda) -> None:
    from experts.kernels.grouped import expert_ffn

    torch.manual_seed(4)
    case = _case("w8a8", 2, V2_LITE)
    x = quantized(random_rows(40, V2_LITE[0], "cuda"))
    pairs = sorted_pairs(torch.randint(0, 2, (40, 1), device=cuda), 2)
    clean = expert_ffn(x, pairs, case.experts)
    spoilt = replace(x, scale_RB=x.scale_RB.clone())
    spoilt.scale_RB[13] = torch.nan
    y_PH = expert_ffn(spoilt, pairs, case.experts)
    bad = int(pairs.place_RK[13, 0])
    assert y_PH[bad].isnan().all()
    y_PH[bad] = clean[bad]
    assert torch.equal(y_PH, clean)
