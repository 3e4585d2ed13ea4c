# ruff: noqa: ANN001, ANN201, ANN202  (what Triton compiles has no Python types)
"""Rows to e4m3 with an fp32 scale per 128 channels: the bytes of codec "float8" (`comms/codecs.py`).

    scale = max(amax, 1e-4) / 448        q = e4m3(x / scale), to the nearest, ties to even

Both divisions are IEEE's, as on a CPU. A block with a NaN or an Inf gets the scale Inf and zeros, and so
decodes to NaN throughout. Magnitudes are compared as integers, among which a NaN is the greatest.

R rows, H hidden, B blocks of 128 channels.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from experts.kernels.early import early, let_next_start, wait_for_inputs
from experts.kernels.types import BLOCK, QuantizedRows

_FEW_ROWS = 256  # wait for memory rather than fill it: more threads for each


def quantize(x_RH: Tensor) -> QuantizedRows:
    """q_RH and scale_RB of bf16 (or fp32) rows, H a multiple of 128. A row's bytes depend on it alone."""
    num_rows, hidden = x_RH.shape
    if not x_RH.is_contiguous():
        raise ValueError(f"quantize needs contiguous rows: {list(x_RH.shape)}")
    out = QuantizedRows.empty(num_rows, hidden, x_RH.device)
    blocks = hidden // BLOCK
    group = next(g for g in (8, 4, 2, 1) if blocks % g == 0)  # blocks of a program
    if num_rows:
        _quantize[(num_rows * (blocks // group),)](
            x_RH,
            out.q_RH,
            out.scale_RB,
            GROUP=group,
            num_warps=max(1, group // (2 if num_rows <= _FEW_ROWS else 4)),
            **early(x_RH.device),
        )
    return out


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _quantize(  # type: ignore[no-untyped-def]
    x, q_out, scale_out, GROUP: tl.constexpr, EARLY: tl.constexpr
):
    wait_for_inputs(EARLY)
    let_next_start(EARLY)
    blocks = tl.program_id(0).to(tl.int64) * GROUP + tl.arange(0, GROUP)
    at = blocks[:, None] * 128 + tl.arange(0, 128)[None, :]
    q, scale = quantize_blocks(tl.load(x + at).to(tl.float32))
    tl.store(q_out + at, q)
    tl.store(scale_out + blocks, scale)


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def quantize_blocks(values):  # type: ignore[no-untyped-def]
    """(q, scale) of fp32 values [blocks, 128], for any kernel that quantises."""
    magnitude = values.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    peak = tl.max(magnitude, 1)
    refused = peak >= 0x7F800000
    amax = tl.where(refused, 1.0, peak.to(tl.float32, bitcast=True))
    scale = tl.div_rn(tl.maximum(amax, 1e-4), tl.full(amax.shape, 448.0, tl.float32))
    values = tl.where(refused[:, None], 0.0, values)
    scaled = tl.div_rn(values, tl.broadcast_to(scale[:, None], values.shape))
    scaled = tl.minimum(tl.maximum(scaled, -448.0), 448.0)
    return scaled.to(tl.float8e4nv), tl.where(refused, float("inf"), scale)


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def store_quantized(values, q_out, scale_out, row, H: tl.constexpr, N: tl.constexpr):  # type: ignore[no-untyped-def]
    """A row's bf16 values [N], of which H are channels, as `quantize` stores them."""
    block = tl.arange(0, N // 128)
    q, scale = quantize_blocks(tl.reshape(values.to(tl.float32), [N // 128, 128]))
    at = block[:, None] * 128 + tl.arange(0, 128)[None, :]
    tl.store(q_out + row * H + at, q, mask=at < H)
    tl.store(scale_out + row * (H // 128) + block, scale, mask=block < H // 128)
