# ruff: noqa: ANN001, ANN202  (what Triton compiles has no Python types)
"""Norms and the activation of a layer: a row is read once and written once, each in one launch.

They round where `cluster/model/norm.py`, `cluster/model/layers.py` and `experts/activation.py` do:
fp32 inside, cast once at the end; the residual stream is added up in its own dtype.

Legend: T rows, H channels, I intermediate.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cluster.model.cuda.rotate import RopeTable, gqa_write, mla_write
from experts.kernels.early import early, let_next_start, wait_for_inputs
from experts.kernels.norm import normed
from experts.kernels.quantize import store_quantized
from experts.kernels.types import QuantizedRows, parts_of

__all__ = [
    "RopeTable",
    "add_rms_norm",
    "gqa_write",
    "mla_write",
    "rms_norm",
    "silu_and_multiply",
]


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, quantized: QuantizedRows | None = None
) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension; contiguous, in x's dtype.

    Rows may be slices of wider ones: x is [T, H] with any row stride, or any contiguous shape. They are also
    stored to `quantized`, if given.
    """
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    out = torch.empty(x.shape, device=x.device, dtype=x.dtype)
    _launch_norm(rows, None, weight, out, None, eps, quantized)
    return out


def add_rms_norm(
    x_TH: Tensor,
    residual_TH: Tensor,
    weight: Tensor,
    eps: float,
    quantized: QuantizedRows | None = None,
) -> tuple[Tensor, Tensor]:
    """(norm of the sum, the sum): the sum rounded to the rows' dtype before its norm is taken."""
    out_TH, sum_TH = torch.empty_like(residual_TH), torch.empty_like(residual_TH)
    _launch_norm(x_TH, residual_TH, weight, out_TH, sum_TH, eps, quantized)
    return out_TH, sum_TH


def _launch_norm(
    x_TH: Tensor,
    residual_TH: Tensor | None,
    weight: Tensor,
    out: Tensor,
    sums: Tensor | None,
    eps: float,
    quantized: QuantizedRows | None,
) -> None:
    num_rows, channels = x_TH.shape
    if x_TH.stride(1) != 1 or weight.shape != (channels,):
        raise ValueError(f"rows {list(x_TH.shape)} for a norm of {list(weight.shape)}")
    if residual_TH is not None and not (
        residual_TH.is_contiguous() and residual_TH.shape == x_TH.shape
    ):
        raise ValueError(f"residual {list(residual_TH.shape)} for rows {list(x_TH.shape)}")
    if num_rows:
        block = triton.next_power_of_2(channels)
        _rms_norm[(num_rows,)](
            x_TH, residual_TH, weight, out, sums, *parts_of(quantized), x_TH.stride(0), eps,
            H=channels, BLOCK=block, num_warps=min(8, max(1, block // 512)),
            enable_fp_fusion=False, **early(x_TH.device),
        )  # fmt: skip


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _rms_norm(  # type: ignore[no-untyped-def]
    x, residual, weight, out, sums, q_out, scale_out, stride, eps,
    H: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    h = tl.arange(0, BLOCK)
    here = h < H
    row = tl.program_id(0).to(tl.int64)
    gain = tl.load(weight + h, mask=here, other=0.0).to(tl.float32)
    wait_for_inputs(EARLY)
    let_next_start(EARLY)
    x_row = tl.load(x + row * stride + h, mask=here, other=0.0)
    if residual is not None:
        added = tl.load(residual + row * H + h, mask=here, other=0.0).to(tl.float32)
        x_row = (added + x_row.to(tl.float32)).to(x_row.dtype)
        tl.store(sums + row * H + h, x_row, mask=here)
    norm = normed(x_row.to(tl.float32), gain, eps, H, BLOCK).to(out.dtype.element_ty)
    tl.store(out + row * H + h, norm, mask=here)
    if q_out is not None:
        store_quantized(norm, q_out, scale_out, row, H, BLOCK)


def silu_and_multiply(gate_up: Tensor) -> Tensor:
    """silu(gate) * up for `gate_up` [T, 2I], gate first: [T, I]."""
    num_rows, channels = gate_up.shape
    if channels % 2 or not gate_up.is_contiguous():
        raise ValueError(f"gate and up side by side, got {list(gate_up.shape)}")
    intermediate = channels // 2
    out = gate_up.new_empty(num_rows, intermediate)
    if num_rows:
        block = min(1024, triton.next_power_of_2(intermediate))
        _silu_and_multiply[(num_rows, triton.cdiv(intermediate, block))](
            gate_up, out, intermediate, BLOCK=block, num_warps=max(1, block // 256),
            **early(gate_up.device),
        )  # fmt: skip
    return out


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _silu_and_multiply(  # type: ignore[no-untyped-def]
    gate_up, out, intermediate, BLOCK: tl.constexpr, EARLY: tl.constexpr
):
    wait_for_inputs(EARLY)
    let_next_start(EARLY)
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = i < intermediate
    gate = tl.load(gate_up + row * 2 * intermediate + i, mask=here, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * intermediate + intermediate + i, mask=here, other=0.0)
    result = gate / (1.0 + tl.exp(-gate)) * up.to(tl.float32)
    tl.store(out + row * intermediate + i, result.to(out.dtype.element_ty), mask=here)
