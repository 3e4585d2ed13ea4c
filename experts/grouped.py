"""Grouped expert computation: rows sorted by slot, two products per slot in use, rows put back.

R received rows, K experts per token, P (row, k) pairs with a slot here, S slots, H hidden,
I intermediate.
"""

from __future__ import annotations

import torch
from torch import Tensor

from experts.activation import silu_and_multiply
from experts.linear import stable_linear
from experts.weights import ExpertSlots


def run_experts(x_RH: Tensor, local_slots_RK: Tensor, slots: ExpertSlots) -> Tensor:
    """y_PH: the unweighted output of each pair with a local slot (>= 0), pairs in row-major order.

    local_slots_RK is int64, -1 where a pair is not for this rank. A pair's output depends on its
    row and its expert alone, bit for bit. Dtype of x. Raises ValueError for a slot out of range.
    """
    num_choices = local_slots_RK.shape[1]
    chosen = local_slots_RK.flatten()
    pairs_P = (chosen >= 0).nonzero().squeeze(1)
    slot_P, order_P = chosen[pairs_P].sort(stable=True)
    counts_S = torch.bincount(slot_P, minlength=slots.num_slots).tolist()
    if len(counts_S) > slots.num_slots:
        raise ValueError(f"slot({len(counts_S) - 1}) is outside [0, num_slots({slots.num_slots}))")
    sorted_PH = x_RH[pairs_P[order_P] // num_choices]
    gate_up = _grouped_linear(sorted_PH, slots.w13, counts_S, 2 * slots.intermediate)
    y_PH = torch.empty_like(sorted_PH)
    hidden_PI = silu_and_multiply(gate_up)
    y_PH[order_P] = _grouped_linear(hidden_PI, slots.w2, counts_S, slots.hidden)
    return y_PH


def _grouped_linear(
    x_PI: Tensor, w_SOI: list[Tensor], counts_S: list[int], num_outputs: int
) -> Tensor:
    """Each run of counts_S[s] rows times the transpose of w_SOI[s]: [P, O = num_outputs]."""
    outputs = []
    start = 0
    for slot, count in enumerate(counts_S):
        if count:
            outputs.append(stable_linear(x_PI[start : start + count], w_SOI[slot]))
            start += count
    return torch.cat(outputs) if outputs else x_PI.new_empty(0, num_outputs)
