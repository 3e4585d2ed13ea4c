# ruff: noqa: ANN001, ANN201  (what Triton compiles has no Python types)
"""FP8 weights on GPUs without FP8 arithmetic: e4m3 bytes become bfloat16 by moving bits.

Sign, exponent and fraction go to where bfloat16 has them; what is missing is the difference of the
exponent biases, 2^(127 - 7), and multiplying by it is exact, of subnormals too. NaN bytes come out as
+-480, so weights that have any are refused where they are read.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def bfloat16_of(bits):  # type: ignore[no-untyped-def]
    """bfloat16 values of e4m3 bytes (uint8)."""
    wide = bits.to(tl.int8, bitcast=True).to(tl.int16)
    moved = ((wide << 4) & -0x7810).to(tl.bfloat16, bitcast=True)
    return (moved.to(tl.float32) * 1.329227995784916e36).to(tl.bfloat16)  # 2^120
