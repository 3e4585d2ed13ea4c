# ruff: noqa: ANN001, ANN201  (what Triton compiles has no Python types)
"""The norm of a row, for every kernel that has a whole row: the same bits in all of them.

    x / sqrt(mean(x^2) + eps) * gain        fp32 inside, rounded by whoever stores it

How a kernel's threads divide a row is the compiler's choice, and so would be the order of its sum. Here
neighbours are added, then neighbours among those sums, and so on: a sum of two has no order.

H channels.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def normed(values, gain, eps, H: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of fp32 values [BLOCK], 0 from H on. Kernels have enable_fp_fusion=False: no product is fused with a sum
    but the one that says so."""
    mean = tl.fma(ordered_sum(values * values, BLOCK), 1.0 / H, eps)
    return values * tl.rsqrt(mean) * gain


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def ordered_sum(x, N: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of N numbers, a power of 2."""
    for halves in tl.static_range(30):
        if (N >> halves) > 1:
            x = tl.sum(tl.reshape(x, [N >> (halves + 1), 2]), 1)
    return tl.sum(x, 0)
