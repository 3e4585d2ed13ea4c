"""Rows to FP8 on the device: the bytes of the CPU's codec, whatever the values."""

import torch
from torch import Tensor

from comms.codecs import CODECS


def peculiar_rows(num_rows: int, hidden: int, seed: int) -> Tensor:
    """bf16 rows of magnitudes from 1e-8 to 1e6, with NaN, Inf, zeros of both signs and outliers."""
    generator = torch.Generator().manual_seed(seed)
    x_RH = torch.randn(num_rows, hidden, generator=generator)
    x_RH *= torch.logspace(-8, 6, num_rows)[torch.randperm(num_rows, generator=generator), None]
    x_RH[0, 5] = float("nan")
    x_RH[1 % num_rows, hidden - 1] = float("-inf")
    x_RH[2 % num_rows, :128] = 0
    x_RH[2 % num_rows, 7] = -0.0
    x_RH[3 % num_rows, 9] = 3e38
    x_RH[4 % num_rows, :128] = 2.0 ** torch.arange(-40, 88)[torch.randperm(128)]
    return x_RH.to(torch.bfloat16)


def check(device: torch.device, sizes: list[tuple[int, int]]) -> None:
    from experts.kernels.quantize import quantize
    from experts.kernels.swiglu import swiglu, swiglu_quantized

    for num_rows, hidden in sizes:
        x_RH = peculiar_rows(num_rows, hidden, seed=hidden)
        rows = quantize(x_RH.to(device))
        _same_bytes(x_RH, rows.q_RH, rows.scale_RB)
        gate_up = torch.randn(num_rows, 2 * hidden).to(torch.bfloat16).to(device)
        rows = swiglu_quantized(gate_up)
        _same_bytes(swiglu(gate_up).cpu(), rows.q_RH, rows.scale_RB)


def _same_bytes(x_RH: Tensor, q_RH: Tensor, scale_RB: Tensor) -> None:
    hidden = x_RH.shape[1]
    expected = CODECS["float8"].encode(x_RH)
    torch.testing.assert_close(
        scale_RB.cpu(), expected[:, hidden:].contiguous().view(torch.float32), rtol=0, atol=0
    )
    assert torch.equal(q_RH.cpu().view(torch.uint8), expected[:, :hidden])


def check_swiglu(device: torch.device, sizes: list[tuple[int, int]]) -> None:
    """Against the CPU's activation: exp may differ in the last fp32 bits, so a bf16 may, by one step."""
    from experts.activation import silu_and_multiply
    from experts.kernels.swiglu import swiglu

    for num_rows, intermediate in sizes:
        gate_up = (torch.randn(num_rows, 2 * intermediate) * 3).to(torch.bfloat16)
        found, expected = swiglu(gate_up.to(device)).cpu(), silu_and_multiply(gate_up)
        differ = found != expected
        assert differ.float().mean() < 1e-3
        torch.testing.assert_close(found, expected, rtol=2**-7, atol=0)


def test_bytes_are_those_of_the_codec(cuda: torch.device) -> None:
    check(cuda, [(5, 128), (7, 1408), (300, 2048), (129, 7168), (4096, 7168)])


def test_activation_is_that_of_the_cpu(cuda: torch.device) -> None:
    check_swiglu(cuda, [(1, 64), (33, 1408), (300, 2816), (128, 2048)])


def test_every_bfloat16_as_a_block_of_its_own(cuda: torch.device) -> None:
    """All 65,536 bit patterns, each as the greatest of a block and as a small one beside 1.0."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16)
    x_RH = torch.zeros(len(every), 128, dtype=torch.bfloat16)
    x_RH[:, 3], x_RH[:, 64] = every, every
    check_rows = torch.cat([x_RH, x_RH.clone()])
    check_rows[len(every) :, 100] = 1.0
    from experts.kernels.quantize import quantize

    rows = quantize(check_rows.to(cuda))
    _same_bytes(check_rows, rows.q_RH, rows.scale_RB)
