"""The launch of `hopper_linear_few`: dense products of up to 16 tokens.

Legend: T tokens, O output and I input channels, N independent products.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from experts.kernels.early import early
from experts.kernels.hopper_linear_few import hopper_linear_few

OUTPUTS, TOKENS = 64, 16
"""Of a program: what one tensor core instruction takes."""

STAGE_BYTES = 110 * 1024
"""Of shared memory, for tiles of weights and tokens: half of it, so that two kernels find room."""

_DEPTHS = (256, 128, 64)
"""Channels of a tile, bf16: the more, the less often the tensor cores are waited for."""


def linear_few(
    x_TNI: Tensor,
    w_NOI: Tensor,
    out_TNO: Tensor,
    x_scale: Tensor | None,
    w_scale: Tensor | None,
    part: int,
) -> bool:
    """x @ w.T to out for the operands of `experts.kernels.linear`, if they suit this kernel; whether they did.

    bf16, or e4m3 with scales, whose sums are made in parts of so many channels.
    """
    num_tokens, num, inputs = x_TNI.shape
    outputs, size = w_NOI.shape[1], w_NOI.element_size()
    depth = 128 if size == 1 else next((d for d in _DEPTHS if inputs % d == 0), 64)
    x_token, x_number, _ = x_TNI.stride()
    columns = (num - 1) * x_number + inputs
    x_token = max(x_token, columns)  # of a single token it may be anything
    if (
        num_tokens > TOKENS
        or w_NOI.dtype == torch.float32
        or inputs % depth
        or x_token * size % 16
        or x_TNI.data_ptr() % 16
        or w_NOI.data_ptr() % 16
        or (num > 1 and outputs % OUTPUTS)
    ):
        return False
    layout = gl.NVMMASharedLayout(128, 8 * size, 2)
    rows = TensorDescriptor(x_TNI, [num_tokens, columns], [x_token, 1], [TOKENS, depth], layout)
    weights = TensorDescriptor.from_tensor(w_NOI.flatten(0, 1), [OUTPUTS, depth], layout)
    steps, stage = inputs // depth, (OUTPUTS + TOKENS) * depth * size
    hopper_linear_few[(-(-outputs // OUTPUTS), num)](
        rows, weights, out_TNO, x_scale, w_scale,
        num_tokens, outputs, x_number, out_TNO.stride(0), out_TNO.stride(1),
        STEPS=steps, STEPS_OF_PART=part // depth, DEPTH=depth, STAGES=min(steps, STAGE_BYTES // stage),
        SCALED=x_scale is not None, TURN=next(n for n in (4, 2, 1) if steps % n == 0), num_warps=4, **early(x_TNI.device),
    )  # fmt: skip
    return True
