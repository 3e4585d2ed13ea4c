"""The experts' grouped products: right, and the same bits whatever a row's company.

On a CPU Triton's interpreter runs them. It cuts bfloat16 off instead of rounding it and halves some
values just below a power of two when it makes e4m3 of them, hence its wide bounds.
"""

from __future__ import annotations

import pytest
import torch

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


def test_no_rows() -> None:
    pytest.importorskip("triton", reason="needs triton (the extra gpu)")
    from experts.kernels.grouped import expert_ffn

    case = _case("bfloat16", 2, MOSAIC, "cpu")
    pairs = sorted_pairs(torch.zeros(0, 2, dtype=torch.int64), 2)
    assert expert_ffn(torch.zeros(0, 256).bfloat16(), pairs, case.experts).shape == (0, 256)
