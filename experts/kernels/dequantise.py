# ruff: noqa: ANN001, ANN201  (what Triton compiles has no Python types)
"""FP8 weights on GPUs without FP8 arithmetic: e4m3 bytes become bfloat16 by moving bits.

Sign, exponent and fraction go to where bfloat16 has them; what is missing is the difference of the
exponent biases, 2^(127 - 7), and multiplying by it is exact, of subnormals too. NaN bytes come out as
+-480, so weights that have any are refused before they are used.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def bfloat16_of(bits):  # type: ignore[no-untyped-def]
    """bfloat16 values of e4m3 bytes (uint8)."""
    wide = bits.to(tl.int8, bitcast=True).to(tl.int16)
    moved = ((wide << 4) & -0x7810).to(tl.bfloat16, bitcast=True)
    return (moved.to(tl.float32) * 1.329227995784916e36).to(tl.bfloat16)  # 2^120


def check_finite(weights: Tensor, name: str = "weights") -> None:
    """Raises ValueError if float8_e4m3fn weights have a NaN (bytes 0x7F and 0xFF). Waits for the GPU."""
    bits = weights.reshape(-1).view(torch.uint8)
    bad = int(((bits & 0x7F) == 0x7F).sum())
    if bad:
        raise ValueError(f"{name}: {bad} of {bits.numel()} e4m3 bytes are NaN (0x7F or 0xFF)")
