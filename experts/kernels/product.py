# ruff: noqa: ANN001, ANN201  (what Triton compiles has no Python types)
"""A tile's product, which also Triton's interpreter can compute: it keeps bfloat16 as integers."""

from __future__ import annotations

import triton
import triton.language as tl
from triton import knobs

INTERPRETED = tl.constexpr(knobs.runtime.interpret)


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def product(a, b, acc):  # type: ignore[no-untyped-def]
    """a [M, K] @ b [N, K].T + acc in fp32, on tensor cores."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32).T, acc)
    return tl.dot(a, b.T, acc)
