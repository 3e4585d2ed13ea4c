"""Dense products whose rows do not depend on the batch they are computed in.

The contracted dimension is walked in one order: parts of a length fixed by the weight's shape, 16 or
32 channels an instruction inside a part, parts added in order. On Hopper every matrix instruction of
bf16 gives the same bits for the same order (mma.sync and wgmma, any width, operands swapped or not),
and so does every wgmma of e4m3: tests/gpu/test_linear.py. So the tile may follow the number of tokens.

bf16 weights have one part. Products of e4m3 and of fp32 weights take longer chains of instructions
for fewer bytes, so few output rows are spread over the multiprocessors by parts: with few tokens each
part has a program, and the last of a tile to arrive adds them up; with many one program walks them
all, and so does one that has its weights already (`hopper_linear_few`). All make the same additions.

Legend: T tokens, O output and I input channels, N independent products, B blocks of 128 channels.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from torch.nn import functional
from triton.tools.tensor_descriptor import TensorDescriptor

from experts.kernels.counters import counters
from experts.kernels.early import early
from experts.kernels.linear_few import OUTPUTS, TOKENS, linear_few
from experts.kernels.linear_kernels import by_descriptors, by_pointers
from experts.kernels.linear_tiles import (
    MULTIPROCESSORS,
    Tiles,
    part_channels,
    programs_of,
    tiles_for,
)
from experts.kernels.quantize import quantize
from experts.kernels.types import BLOCK, QuantizedRows
from experts.kernels.which_gpu import is_hopper, is_hopper_or_newer


def linear(
    x_TI: Tensor | QuantizedRows,
    w_OI: Tensor,
    scale: Tensor | None = None,
    *,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """x @ w.T as [T, O], bf16 or `out_dtype`; x may be a slice of columns.

    bf16 weights take bf16 rows; e4m3 weights, with an fp32 `scale` for each 128 x 128 of them
    [ceil(O/128), ceil(I/128)], take `QuantizedRows` or bf16 rows, which are quantised first.
    Raises ValueError for shapes or dtypes that do not fit together.
    """
    inputs = w_OI.shape[1]
    if w_OI.dtype == torch.float8_e4m3fn and isinstance(x_TI, Tensor):
        if inputs % BLOCK:
            x_TI = functional.pad(x_TI, (0, -inputs % BLOCK))
        x_TI = quantize(x_TI.contiguous())
    rows = x_TI if isinstance(x_TI, Tensor) else x_TI.q_RH[:, :inputs]
    x_scale = None if isinstance(x_TI, Tensor) else x_TI.scale_RB
    if (scale is None) != (x_scale is None) or rows.dtype != w_OI.dtype:
        raise ValueError(
            f"rows of {rows.dtype} for weights of {w_OI.dtype}, scale {scale is not None}"
        )
    dtype = out_dtype or torch.bfloat16
    out_TO = torch.empty(len(rows), len(w_OI), device=rows.device, dtype=dtype)
    _product(rows.unsqueeze(1), w_OI.unsqueeze(0), out_TO.unsqueeze(1), x_scale, scale)
    return out_TO


def linears(x_TNI: Tensor, w_NOI: Tensor, out_TNO: Tensor | None = None) -> Tensor:
    """N independent bf16 products, [T, N, O]; x and out may be slices of wider tensors."""
    if out_TNO is None:
        num_tokens, num, _ = x_TNI.shape
        out_TNO = x_TNI.new_empty(num_tokens, num, w_NOI.shape[1])
    _product(x_TNI, w_NOI, out_TNO, None, None)
    return out_TNO


def linear_fp32(x_TH: Tensor, w_EH: Tensor) -> Tensor:
    """x @ w.T in fp32 of bf16 rows and fp32 weights: [T, E].

    A weight is the sum of three bf16 numbers, whose products with bf16 are exact in fp32.
    """
    out_TE = torch.empty(len(x_TH), len(w_EH), device=x_TH.device, dtype=torch.float32)
    _product(x_TH.unsqueeze(1), w_EH.unsqueeze(0), out_TE.unsqueeze(1), None, None)
    return out_TE


def linear_fp32_parts(x_TH: Tensor, w_EH: Tensor) -> Tensor:
    """`linear_fp32` as [P, T, E]: what is to be added up in order, for a kernel that reads it anyway.

    With few rows a part is made by a program of its own, and nobody has to wait for the last of them.
    """
    num_tokens, (outputs, inputs) = len(x_TH), w_EH.shape
    tiles = tiles_for(1, num_tokens, outputs, inputs, w_EH.dtype)
    num_parts = triton.cdiv(inputs, part_channels(1, outputs, inputs, w_EH.dtype))
    if not _is_spread(num_parts, programs_of(tiles, num_tokens, outputs)):
        return linear_fp32(x_TH, w_EH).unsqueeze(0)
    parts_PTE = torch.empty(num_parts, num_tokens, outputs, device=x_TH.device, dtype=torch.float32)
    _product(x_TH.unsqueeze(1), w_EH.unsqueeze(0), parts_PTE[0].unsqueeze(1), None, None, parts_PTE)
    return parts_PTE


def _product(
    x_TNI: Tensor,
    w_NOI: Tensor,
    out_TNO: Tensor,
    x_scale: Tensor | None,
    w_scale: Tensor | None,
    parts: Tensor | None = None,
) -> None:
    num_tokens, num, inputs = x_TNI.shape
    outputs = w_NOI.shape[1]
    if (
        tuple(w_NOI.shape) != (num, outputs, inputs)
        or tuple(out_TNO.shape) != (num_tokens, num, outputs)
        or (x_TNI.stride(2) != 1 and inputs > 1)
        or (out_TNO.stride(2) != 1 and outputs > 1)
        or not w_NOI.is_contiguous()
    ):
        raise ValueError(
            f"x {list(x_TNI.shape)}, w {list(w_NOI.shape)} and out {list(out_TNO.shape)} are not "
            "[T, N, I], [N, O, I] and [T, N, O] with channels side by side"
        )
    if num_tokens == 0:
        return
    # Triton's interpreter, on a CPU, counts as one.
    hopper = x_TNI.device.type != "cuda" or is_hopper_or_newer(x_TNI.device)
    tiles = tiles_for(num, num_tokens, outputs, inputs, w_NOI.dtype, hopper=hopper)
    describable = hopper and num == 1 and not tiles.by_pointers
    part = part_channels(num, outputs, inputs, w_NOI.dtype)
    if _is_for_few(w_NOI, num_tokens) and linear_few(x_TNI, w_NOI, out_TNO, x_scale, w_scale, part):
        return
    if describable and _described(x_TNI, w_NOI, out_TNO, tiles):
        return
    programs = programs_of(tiles, num_tokens, outputs)
    num_parts = triton.cdiv(inputs, part)
    spread = _is_spread(num_parts, num * programs)
    partial, counts = out_TNO if parts is None else parts, out_TNO
    if spread and parts is None:
        partial = torch.empty(
            num_parts, num, num_tokens, outputs, device=x_TNI.device, dtype=torch.float32
        )
        counts = counters(x_TNI.device, num * programs)
    by_pointers[(programs, num, num_parts if spread else 1)](
        x_TNI, w_NOI, out_TNO, x_scale, w_scale, partial, counts,
        num_tokens, outputs, inputs, part,
        x_TNI.stride(0), x_TNI.stride(1), out_TNO.stride(0), out_TNO.stride(1),
        BLOCK_O=tiles.outputs, BLOCK_T=tiles.tokens, BLOCK_I=tiles.channels,
        EVEN=inputs % tiles.channels == 0, SCALED=x_scale is not None, PARTS=num_parts,
        SPREAD=spread, JOINED=parts is None, TOKENS_FIRST=tiles.tokens_first,
        num_warps=tiles.warps, num_stages=tiles.stages, **early(x_TNI.device),
    )  # fmt: skip


def _is_for_few(w_NOI: Tensor, num_tokens: int) -> bool:
    """Whether the kernel for few tokens is the faster one: with e4m3 weights, and those of heads.

    With bf16 weights of many megabytes it is slower than the copy engine's pipeline.
    """
    num, outputs, _ = w_NOI.shape
    return (
        num_tokens <= TOKENS
        and num * triton.cdiv(outputs, OUTPUTS) <= MULTIPROCESSORS
        and (num > 1 or w_NOI.dtype == torch.float8_e4m3fn)
        and is_hopper(w_NOI.device)
    )


def _is_spread(num_parts: int, programs: int) -> bool:
    """Whether each part has a program of its own."""
    return num_parts > 1 and programs * num_parts <= 2 * MULTIPROCESSORS


def _described(x_T1I: Tensor, w_1OI: Tensor, out_T1O: Tensor, tiles: Tiles) -> bool:
    """Whether the copy engine can read and write these bf16 operands; then the product is made."""
    rows = (x_T1I[:, 0], w_1OI[0], out_T1O[:, 0])
    if any(r.dtype != torch.bfloat16 or r.stride(0) % 8 or r.data_ptr() % 16 for r in rows):
        return False
    num_tokens, outputs, inputs = len(x_T1I), w_1OI.shape[1], w_1OI.shape[2]
    boxes = (
        [tiles.tokens, tiles.channels],
        [tiles.outputs, tiles.channels],
        [tiles.tokens, tiles.outputs],
    )
    by_descriptors[(programs_of(tiles, num_tokens, outputs),)](
        *(TensorDescriptor.from_tensor(r, box) for r, box in zip(rows, boxes, strict=True)),
        num_tokens, outputs, inputs,
        BLOCK_O=tiles.outputs, BLOCK_T=tiles.tokens, BLOCK_I=tiles.channels,
        TOKENS_FIRST=tiles.tokens_first, LOOPED=tiles.warps == 8,
        num_warps=tiles.warps, num_stages=tiles.stages, **early(rows[0].device),
    )  # fmt: skip
    return True
