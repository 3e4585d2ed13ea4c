# ruff: noqa: ANN001, ANN202  (what Triton compiles has no Python types)
"""SwiGLU's activation of dense products, and straight on to FP8 where the next product wants that.

    h = silu(gate) * up      in fp32, rounded to bf16 as `experts/activation.py` does; then quantised

T rows, I intermediate.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from experts.kernels.early import early, let_next_start, wait_for_inputs
from experts.kernels.quantize import quantize_blocks
from experts.kernels.types import BLOCK, QuantizedRows

_BLOCK = 1024


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of bf16 `gate_up` [T, 2I], gate first: [T, I] bf16."""
    num_rows, intermediate = gate_up.shape[0], gate_up.shape[1] // 2
    out_TI = torch.empty((num_rows, intermediate), dtype=torch.bfloat16, device=gate_up.device)
    if num_rows:
        block = min(_BLOCK, triton.next_power_of_2(intermediate))
        _swiglu[(num_rows, triton.cdiv(intermediate, block))](
            gate_up, out_TI, I=intermediate, BLOCK=block, num_warps=max(1, block // 256),
            enable_fp_fusion=False, **early(gate_up.device),
        )  # fmt: skip
    return out_TI


def swiglu_quantized(gate_up: Tensor) -> QuantizedRows:
    """The same as FP8 rows; I a multiple of 128."""
    num_rows, intermediate = gate_up.shape[0], gate_up.shape[1] // 2
    out = QuantizedRows.empty(num_rows, intermediate, gate_up.device)
    blocks = intermediate // BLOCK
    group = next(g for g in (8, 4, 2, 1) if blocks % g == 0)
    if num_rows:
        _swiglu_quantized[(num_rows, blocks // group)](
            gate_up, out.q_RH, out.scale_RB, I=intermediate, GROUP=group, num_warps=max(1, group // 2),
            enable_fp_fusion=False, **early(gate_up.device),
        )  # fmt: skip
    return out


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _activated(gate, up):  # type: ignore[no-untyped-def]
    gate, up = gate.to(tl.float32), up.to(tl.float32)
    return (tl.div_rn(gate, 1.0 + tl.exp(-gate)) * up).to(tl.bfloat16)


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _swiglu(  # type: ignore[no-untyped-def]
    gate_up, out, I: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr  # noqa: E741
):  # fmt: skip
    wait_for_inputs(EARLY)
    let_next_start(EARLY)
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < I
    gate = tl.load(gate_up + row * 2 * I + at, mask=inside)
    up = tl.load(gate_up + row * 2 * I + I + at, mask=inside)
    tl.store(out + row * I + at, _activated(gate, up), mask=inside)


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _swiglu_quantized(  # type: ignore[no-untyped-def]
    gate_up, q_out, scale_out,
    I: tl.constexpr, GROUP: tl.constexpr, EARLY: tl.constexpr,  # noqa: E741
):  # fmt: skip
    wait_for_inputs(EARLY)
    let_next_start(EARLY)
    row = tl.program_id(0).to(tl.int64)
    blocks = tl.program_id(1) * GROUP + tl.arange(0, GROUP)
    at = blocks[:, None] * 128 + tl.arange(0, 128)[None, :]
    gate = tl.load(gate_up + row * 2 * I + at)
    h = _activated(gate, tl.load(gate_up + row * 2 * I + I + at))
    q, scale = quantize_blocks(h.to(tl.float32))
    tl.store(q_out + row * I + at, q)
    tl.store(scale_out + row * (I // 128) + blocks, scale)
