"""Grouped expert computation: rows sorted by slot, one gated MLP per slot in use, rows put back.

R received rows, K experts per token, P (row, k) pairs with a slot here, S slots, H hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor

from experts.mlp import gated_mlp
from experts.weights import ExpertSlots


def run_experts(x_RH: Tensor, local_slots_RK: Tensor, slots: ExpertSlots) -> Tensor:
    """y_PH: the unweighted output of each pair with a local slot (>= 0), pairs in row-major order.

    local_slots_RK is int64, -1 where a pair is not for this rank. A pair's output depends on its
    row and its expert alone, bit for bit. Dtype of x. Raises ValueError for a slot out of range.
    """
    num_choices = local_slots_RK.shape[1]
    chosen = local_slots_RK.flatten()
    pairs_P = (chosen >= 0).nonzero().squeeze(1)
    slot_P = chosen[pairs_P]
    order_P = slot_P.argsort(stable=True)
    counts_S = torch.bincount(slot_P, minlength=slots.num_slots).tolist()
    if len(counts_S) > slots.num_slots:
        raise ValueError(f"slot({len(counts_S) - 1}) is outside [0, num_slots({slots.num_slots}))")
    sorted_PH = x_RH[pairs_P[order_P] // num_choices]
    y_PH = torch.empty_like(sorted_PH)
    start = 0
    for slot, count in enumerate(counts_S):
        if count:
            part = slice(start, start + count)
            y_PH[order_P[part]] = gated_mlp(sorted_PH[part], slots.w13[slot], slots.w2[slot])
            start += count
    return y_PH
