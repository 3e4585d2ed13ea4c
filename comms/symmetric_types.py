"""What passes between the halves of an exchange over symmetric memory.

Legend: T my tokens, K top-k, H hidden, B blocks of 128 channels, R received rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from comms.symmetric_layout import SymmetricLayout


@dataclass(frozen=True, kw_only=True)
class Received:
    """What this rank's experts get, [R, ...] by (source rank, source token), in shared memory: it
    lasts until the next but one dispatch.

    x_RH: bfloat16, or e4m3 to be multiplied with scale_RB. local_slots_RK: int32, -1 where the
    token's k-th slot is not on this rank; what else a row without any slot holds means nothing.
    weights_RK: fp32. range_R: fp32, combine "fixed" only.
    """

    x_RH: Tensor
    scale_RB: Tensor | None
    local_slots_RK: Tensor
    weights_RK: Tensor
    range_R: Tensor | None


@dataclass(frozen=True, kw_only=True)
class SymmetricHandle:
    """From a dispatch to its combine. buffer: which of the two; num_rows: per source rank."""

    buffer: int
    num_rows: int
    slots_TK: Tensor
    range_T: Tensor | None
    received: Received


def check_arguments(
    layout: SymmetricLayout,
    num_rows: int,
    x_TH: Tensor,
    slots_TK: Tensor,
    weights_TK: Tensor,
    range_T: Tensor | None,
) -> None:
    """Raise ValueError for what cannot be dispatched, `num_rows` being the most tokens of a rank."""
    num_tokens = len(x_TH)
    check_tensor("x_TH", x_TH, (torch.bfloat16,), (num_tokens, layout.hidden))
    pairs = (num_tokens, layout.num_topk)
    check_tensor("slots_TK", slots_TK, (torch.int32, torch.int64), pairs)
    check_tensor("weights_TK", weights_TK, (torch.float32,), pairs)
    if layout.combine == "fixed":
        if range_T is None:
            raise ValueError('combine "fixed" needs range_T, got None')
        check_tensor("range_T", range_T, (torch.float32,), (num_tokens,))
    if num_tokens > num_rows:
        raise ValueError(f"expected at most {num_rows} tokens a rank, got {num_tokens}")


def check_tensor(
    name: str, x: Tensor, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...]
) -> None:
    """Raise ValueError unless x has one of the dtypes, that shape, and rows without gaps."""
    if x.dtype not in dtypes or tuple(x.shape) != shape or not x.is_contiguous():
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(
            f"{name} must be contiguous {wanted} {list(shape)}, got {x.dtype} {list(x.shape)}"
        )
