"""Experts' outputs back to rows: the weighted sum over each row's pairs, bit for bit the CPU's.

    exact    out = sum over k in top-k order of weight * y, in fp32: product, then sum, each rounded
             (`comms/routes.weighted_sum`)
    fixed    q = rint(y * (weight * (2^15 / range))), out = (sum of q, as integers) * (range / 2^15),
             NaN where a pair is refused (`comms/fixed.py`)

Both go by place_RK, so nothing depends on where a pair was sorted to. What is added afterwards, the
shared expert's output say, is added to the rounded sum, as the layer on a CPU does.

R rows, H hidden, K experts per token, P places, B programs of a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from comms.fixed import greatest_summand
from experts.kernels.combine_kernels import exact, fixed, fixed_large
from experts.kernels.early import early
from experts.kernels.types import QuantizedRows, SortedPairs, parts_of

_FEW = 2
"""Pairs of a row that are looked up one by one: cheaper than to skip the others of K."""
_NARROW, _WIDE, _FEW_ROWS = 256, 1024, 256
"""Channels of a program, 256 to a warp: many small programs fill a GPU sooner, and cost more to start."""
_WHOLE = 8192  # channels of a row that one program may have
_ROWS = 8  # of a program that looks for what is seldom


def weighted_sum(
    y_PH: Tensor,
    pairs: SortedPairs,
    weights_RK: Tensor,
    *,
    range_R: Tensor | None = None,
    extra_RH: Tensor | None = None,
) -> Tensor:
    """out_RH bf16: sum over k of weights_RK (fp32) * y_PH (bf16, in the pairs' sorted order).

    A row without a pair here is zero. With `range_R` (fp32) the sum is the associative one; with
    `extra_RH` (bf16) that is added. Raises ValueError for shapes that do not fit together.
    """
    return Unsummed(
        y_PH=y_PH, pairs=pairs, weights_RK=weights_RK, range_R=range_R, extra_RH=extra_RH
    ).sum()


@dataclass(frozen=True, kw_only=True)
class _NormOfSum:
    """What is made of a sum: it is added to residual_RH bf16, and normed with gain_H and eps; the norm is
    also stored to `quantized`, if given."""

    residual_RH: Tensor
    gain_H: Tensor
    eps: float
    added_RH: Tensor
    quantized: QuantizedRows | None


@dataclass(frozen=True, kw_only=True)
class Unsummed:
    """The arguments of a `weighted_sum`, for whoever has more to do with each row of it."""

    y_PH: Tensor
    pairs: SortedPairs
    weights_RK: Tensor
    range_R: Tensor | None
    extra_RH: Tensor | None

    def sum(self) -> Tensor:
        return _launch(self, None)

    def normed(
        self,
        residual_RH: Tensor,
        gain_H: Tensor,
        eps: float,
        quantized: QuantizedRows | None = None,
    ) -> tuple[Tensor, Tensor] | None:
        """(norm of the sum + residual, that sum) in the same launch, None where programs have no whole
        rows; the bits of `sum` and `add_rms_norm`."""
        num_rows, hidden = residual_RH.shape
        if not 0 < num_rows <= _FEW_ROWS or hidden > _WHOLE or not residual_RH.is_contiguous():
            return None
        added_RH = torch.empty_like(residual_RH)
        norm = _NormOfSum(
            residual_RH=residual_RH, gain_H=gain_H, eps=eps, added_RH=added_RH, quantized=quantized
        )
        return _launch(self, norm), added_RH


def _launch(sums: Unsummed, norm: _NormOfSum | None) -> Tensor:
    y_PH, pairs, weights_RK = sums.y_PH, sums.pairs, sums.weights_RK
    range_R, extra_RH = sums.range_R, sums.extra_RH
    num_rows, num_topk = pairs.place_RK.shape
    hidden = y_PH.shape[1]
    if tuple(weights_RK.shape) != (num_rows, num_topk) or weights_RK.dtype != torch.float32:
        raise ValueError(f"weights {weights_RK.dtype} {list(weights_RK.shape)} are not fp32 [R, K]")
    if extra_RH is not None and tuple(extra_RH.shape) != (num_rows, hidden):
        raise ValueError(f"extra {list(extra_RH.shape)} is not [{num_rows}, {hidden}]")
    out_RH = torch.empty((num_rows, hidden), dtype=torch.bfloat16, device=y_PH.device)
    if not num_rows:
        return out_RH
    extra = out_RH if extra_RH is None else extra_RH
    weights_RK = weights_RK.contiguous()
    whole = (range_R is not None or norm is not None) and num_rows <= _FEW_ROWS and hidden <= _WHOLE
    block = triton.next_power_of_2(hidden)
    if not whole:
        block = min(_NARROW if num_rows <= _FEW_ROWS else _WIDE, block)
    tiles = triton.cdiv(hidden, block)
    sizes = {
        "H": hidden, "K": num_topk, "K_PAD": triton.next_power_of_2(num_topk), "BLOCK": block,
        "EXTRA": extra_RH is not None,
    }  # fmt: skip
    options = {
        "num_warps": max(1, block // 256), "enable_fp_fusion": False, **early(y_PH.device),
    }  # fmt: skip
    then: tuple[Tensor | float | None, ...] = (None, None, None, None, None, 0.0)
    if norm is not None:
        then = (norm.residual_RH, norm.gain_H, norm.added_RH, *parts_of(norm.quantized), norm.eps)
    if range_R is None:
        exact[(num_rows, tiles)](
            y_PH, pairs.place_RK, weights_RK, extra, out_RH, *then, FEW=_FEW, **sizes, **options
        )
        return out_RH
    large_RB = torch.empty((num_rows, tiles), dtype=torch.int32, device=y_PH.device)
    arguments = (y_PH, pairs.place_RK, weights_RK, range_R, extra, out_RH, large_RB)
    sizes["LIMIT"] = greatest_summand(num_topk)
    fixed[(num_rows, tiles)](*arguments, *then, WHOLE=whole, FEW=_FEW, **sizes, **options)
    if not whole:
        fixed_large[(triton.cdiv(num_rows, _ROWS),)](
            *arguments, num_rows, ROWS=_ROWS, TILES=tiles,
            TILES_PAD=triton.next_power_of_2(tiles), **sizes, **options,
        )  # fmt: skip
    return out_RH
