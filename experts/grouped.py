"""Grouped expert computation: rows sorted by slot, two products, rows put back.

Large experts are computed one after the other. Of small ones a call costs more than the product, so they
are computed together: the rows of each in tiles of equal size, and all tiles in one batched product with
the same bits.

R received rows, K experts per token, P (row, k) pairs with a slot here, S slots, H hidden,
I intermediate, A tiles, M rows of a tile.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from experts.activation import silu_and_multiply
from experts.linear import small_tiles, stable_linear
from experts.weights import ExpertSlots

Indices = NDArray[np.int64]


def run_experts(x_RH: Tensor, local_slots_RK: Tensor, slots: ExpertSlots) -> Tensor:
    """y_PH: the unweighted output of each pair with a local slot (>= 0), pairs in row-major order.

    local_slots_RK is int64, -1 where a pair is not for this rank. A pair's output depends on its
    row and its expert alone, bit for bit. Dtype of x. Raises ValueError for a slot out of range.
    """
    valid_RK = local_slots_RK.numpy() >= 0
    slot_P = local_slots_RK.numpy()[valid_RK]
    counts_S = np.bincount(slot_P, minlength=slots.num_slots)
    if len(counts_S) > slots.num_slots:
        raise ValueError(f"slot({len(counts_S) - 1}) is outside [0, num_slots({slots.num_slots}))")
    if not len(slot_P):
        return x_RH.new_empty(0, slots.hidden)
    order_P = slot_P.argsort(kind="stable")
    rows_P = valid_RK.nonzero()[0][order_P]
    num_rows = _rows_of_a_tile(x_RH, counts_S, slots)
    if num_rows is None:
        y_PH = _one_by_one(x_RH[torch.from_numpy(rows_P)], counts_S.tolist(), slots)
        places_P = np.arange(len(order_P))
    else:
        tiles = _Tiles.of(counts_S, num_rows)
        y_PH = _together(x_RH, rows_P, tiles, slots)
        places_P = tiles.places_P
    back_P = np.empty_like(order_P)
    back_P[order_P] = places_P
    return y_PH.index_select(0, torch.from_numpy(back_P))


@dataclass(frozen=True)
class _Tiles:
    """The slot of each tile, and of each pair, sorted by slot, its place among all tiles' rows."""

    num_rows: int
    slot_A: Indices
    places_P: Indices

    @staticmethod
    def of(counts_S: Indices, num_rows: int) -> _Tiles:
        tiles_S = -(-counts_S // num_rows)
        # What the padding of all slots before moves a slot's rows back by.
        padding_S = tiles_S * num_rows - counts_S
        moved_S = np.cumsum(padding_S) - padding_S
        return _Tiles(
            num_rows=num_rows,
            slot_A=np.repeat(np.arange(len(counts_S)), tiles_S),
            places_P=np.arange(counts_S.sum()) + np.repeat(moved_S, counts_S),
        )


def _rows_of_a_tile(x_RH: Tensor, counts_S: Indices, slots: ExpertSlots) -> int | None:
    """About as many as experts have in the mean; None: each expert is better computed alone."""
    hidden, intermediate = slots.hidden, slots.intermediate
    down = small_tiles(x_RH, hidden, intermediate)
    usable = [t for t in small_tiles(x_RH, 2 * intermediate, hidden) if t in down]
    mean = counts_S.sum() / np.count_nonzero(counts_S)
    return max((t for t in usable if t <= mean), default=min(usable, default=None))


def _together(x_RH: Tensor, rows_P: Indices, tiles: _Tiles, slots: ExpertSlots) -> Tensor:
    """The outputs of all tiles' rows. Places that no pair has repeat some row, and mean nothing."""
    used = tiles.slot_A.tolist()
    rows_AM = np.zeros(len(used) * tiles.num_rows, np.int64)
    rows_AM[tiles.places_P] = rows_P
    x_AMH = x_RH.index_select(0, torch.from_numpy(rows_AM)).view(len(used), tiles.num_rows, -1)
    gate_up = torch.bmm(x_AMH, torch.stack([slots[slot].w13 for slot in used]).mT)
    hidden_AMI = silu_and_multiply(gate_up.flatten(0, 1)).view(len(used), tiles.num_rows, -1)
    y_AMH = torch.bmm(hidden_AMI, torch.stack([slots[slot].w2 for slot in used]).mT)
    return y_AMH.flatten(0, 1)


def _one_by_one(sorted_PH: Tensor, counts_S: list[int], slots: ExpertSlots) -> Tensor:
    """The outputs of pairs that are sorted by slot."""
    hidden_PI = silu_and_multiply(_grouped_linear(sorted_PH, slots.w13, counts_S))
    return _grouped_linear(hidden_PI, slots.w2, counts_S)


def _grouped_linear(x_PI: Tensor, w_SOI: list[Tensor], counts_S: list[int]) -> Tensor:
    """Each run of counts_S[s] rows times the transpose of w_SOI[s]: [P, O]."""
    outputs = []
    start = 0
    for slot, count in enumerate(counts_S):
        if count:
            outputs.append(stable_linear(x_PI[start : start + count], w_SOI[slot]))
            start += count
    return torch.cat(outputs)
