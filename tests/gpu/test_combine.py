"""Outputs of experts back to rows: the bits of the CPU's sums, "exact" and "fixed"."""

from typing import Any

import torch
from torch import Tensor

from comms.fixed import fixed_sum, to_floats
from comms.routes import Pairs, weighted_sum
from experts.kernels.types import QuantizedRows
from tests.gpu.rows import assert_same_rows

SIZES = [(1, 6, 3, 128), (11, 8, 5, 320)]
LARGE = [(9, 2, 4, 192), (128, 8, 4, 7168), (300, 6, 64, 2048)]


class Case:
    """Outputs y_PH in sorted order for random slots; terms that cancel, so that order shows."""

    def __init__(
        self, size: tuple[int, int, int, int], device: torch.device, absent: float
    ) -> None:
        from experts.kernels.sort_by_slot import sort_by_slot

        num_rows, num_topk, num_slots, hidden = size
        generator = torch.Generator().manual_seed(hidden + num_rows)
        slots_RK = torch.randint(0, num_slots, (num_rows, num_topk), generator=generator)
        slots_RK[torch.rand(slots_RK.shape, generator=generator) < absent] = -1
        self.slots_RK = slots_RK
        self.pairs = sort_by_slot(slots_RK.to(device), num_slots)
        y_RKH = torch.randn(num_rows, num_topk, hidden, generator=generator)
        self.weights_RK = torch.rand(num_rows, num_topk, generator=generator) + 0.5
        if num_topk > 2:  # what is added between them depends on the order
            y_RKH[:, 0] *= 2**14
            y_RKH[:, -1] = -y_RKH[:, 0]
            self.weights_RK[:, -1] = self.weights_RK[:, 0]
        self.y_RKH = y_RKH.to(torch.bfloat16)
        self.extra_RH = torch.randn(num_rows, hidden, generator=generator).to(torch.bfloat16)
        self.range_R = (torch.rand(num_rows, generator=generator) + 0.5) * 24

    def sorted(self, device: torch.device) -> Tensor:
        """y_PH; what is beyond the last pair is NaN, and nobody may look at it."""
        flat_PH = self.y_RKH.flatten(0, 1).to(device)
        y_PH = torch.full_like(flat_PH, float("nan"))
        number = int(self.pairs.ends_S[-1])
        y_PH[:number] = flat_PH[self.pairs.pair_P[:number].long()]
        return y_PH

    @property
    def on_cpu(self) -> tuple[Tensor, Pairs]:
        valid_P = self.slots_RK.flatten() >= 0
        pairs = Pairs.of(self.slots_RK.numpy(), self.weights_RK.numpy())
        return self.y_RKH.flatten(0, 1)[valid_P], pairs


def check_normed(*arguments: Any) -> None:
    """A sum that is normed in the same launch is the sum, then added to the rest, normed and quantised."""
    from cluster.model.cuda.fused import add_rms_norm
    from experts.kernels import combine
    from experts.kernels.quantize import quantize

    y_PH, pairs, weights_RK, range_R, extra_RH = arguments
    residual_RH = torch.randn(*extra_RH.shape).to(
        extra_RH
    )  # from the host: there before any launch
    gain_H = torch.randn(extra_RH.shape[1]).to(extra_RH)
    unsummed = combine.Unsummed(
        y_PH=y_PH, pairs=pairs, weights_RK=weights_RK, range_R=range_R, extra_RH=extra_RH
    )
    sum_RH = unsummed.sum()
    quantized = None
    if extra_RH.shape[1] % 128 == 0:
        quantized = QuantizedRows.empty(*extra_RH.shape, extra_RH.device)
    found = unsummed.normed(residual_RH, gain_H, 1e-6, quantized)
    expected = add_rms_norm(sum_RH, residual_RH, gain_H, 1e-6)
    if found is None:
        assert len(sum_RH) > combine._FEW_ROWS
        return
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
    if quantized is not None:
        assert_same_rows(quantized, quantize(found[0]))


def check(device: torch.device, sizes: list[tuple[int, int, int, int]] = SIZES) -> None:
    from experts.kernels.combine import weighted_sum as on_device

    for size in sizes:
        for absent in (0.0, 0.7):
            case = Case(size, device, absent)
            y_PH, weights = case.sorted(device), case.weights_RK.to(device)
            expected = weighted_sum(*case.on_cpu).to(torch.bfloat16)
            out = on_device(y_PH, case.pairs, weights)
            assert torch.equal(out.cpu(), expected)
            if size in SIZES:
                out = on_device(y_PH, case.pairs, weights, extra_RH=case.extra_RH.to(device))
                assert torch.equal(out.cpu(), expected + case.extra_RH)
            check_normed(y_PH, case.pairs, weights, None, case.extra_RH.to(device))


def check_fixed(device: torch.device, sizes: list[tuple[int, int, int, int]] = SIZES) -> None:
    """Also with what is refused: NaN and Inf outputs, ranges that cannot be, values too large."""
    from experts.kernels.combine import weighted_sum as on_device

    for size in sizes:
        for absent in (0.0, 0.7):
            case = Case(size, device, absent)
            rows = size[0]
            case.y_RKH[::2, [0, -1]] *= 2.0**-14  # ordinary rows; in the others every sum is large
            case.y_RKH[1 % rows, 0, 3] = float("nan")
            case.y_RKH[2 % rows, -1, -1] = float("-inf")
            case.y_RKH[3 % rows, 0, 1] = 1e30
            case.y_RKH[4 % rows] *= 512  # beyond 16 bits, and beyond 2^23 steps, but not refused
            case.y_RKH[5 % rows] *= 32768
            case.range_R[9 % rows], case.weights_RK[9 % rows] = 16.0, 1.0  # halves of a step
            halves = torch.randint(-9, 9, case.y_RKH.shape[1:]) * 2 + 1
            case.y_RKH[9 % rows] = halves.to(torch.bfloat16) / 4096
            case.range_R[6 % rows] = float("nan")
            case.range_R[7 % rows] = float("inf")
            case.range_R[8 % rows] = 0.0
            y_PH, weights = case.sorted(device), case.weights_RK.to(device)
            total_RC = fixed_sum(*case.on_cpu, case.range_R)
            expected = to_floats(total_RC, case.range_R, torch.bfloat16)
            arguments = y_PH, case.pairs, weights
            range_R = case.range_R.to(device)
            out = on_device(*arguments, range_R=range_R).cpu()
            torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)
            if size in SIZES:
                extra = case.extra_RH.to(device)
                out = on_device(*arguments, range_R=range_R, extra_RH=extra).cpu()
                expected = expected + case.extra_RH
                torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)
            check_normed(*arguments, range_R, case.extra_RH.to(device))


def test_exact_sums_have_the_bits_of_the_cpu(cuda: torch.device) -> None:
    check(cuda, SIZES + LARGE)


def test_fixed_sums_have_the_bits_of_the_cpu(cuda: torch.device) -> None:
    check_fixed(cuda, SIZES + LARGE)
