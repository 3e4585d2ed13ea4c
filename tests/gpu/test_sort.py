"""Sorting pairs by slot on the device: against numpy's stable sort, and the same in every run."""

import numpy as np
import pytest
import torch
from torch import Tensor

SHAPES = [(1, 1, 1), (1, 6, 16), (16, 8, 4), (129, 8, 3), (800, 6, 3)]
LARGE = [(512, 8, 32), (513, 8, 4), (1024, 8, 4), (1025, 8, 9), (3000, 6, 64), (8192, 8, 64)]
MANY_SLOTS = [(300, 8, 256), (2048, 8, 128)]


def check(device: torch.device, shapes: list[tuple[int, int, int]] = SHAPES) -> None:
    from experts.kernels.sort_by_slot import sort_by_slot

    rng = np.random.default_rng(7)
    for num_rows, num_topk, num_slots in shapes:
        for absent in (0.0, 0.6, 1.0):
            slots = rng.integers(0, num_slots, (num_rows, num_topk))
            slots[rng.random(slots.shape) < absent] = -1
            if absent == 0.6:
                slots[slots == num_slots - 1] = 0  # an empty slot at the end, a long one before
            for dtype in (torch.int32, torch.int64)[:: 2 if absent else 1]:
                slots_RK = torch.from_numpy(slots).to(device, dtype)
                counter_S = torch.full((num_slots,), 5, dtype=torch.int64, device=device)
                pairs = sort_by_slot(slots_RK, num_slots, counter_S=counter_S)
                _same(pairs.pair_P, pairs.place_RK, pairs.ends_S, counter_S, slots, num_slots)


def _same(
    pair_P: Tensor, place_RK: Tensor, ends_S: Tensor, counter_S: Tensor, slots: np.ndarray, num: int
) -> None:
    flat = slots.reshape(-1)
    here = np.flatnonzero(flat >= 0)
    order = here[flat[here].argsort(kind="stable")]
    pairs = np.full(len(flat), -1)
    pairs[: len(order)] = order
    places = np.full(len(flat), -1)
    places[order] = np.arange(len(order))
    counts = np.bincount(flat[here], minlength=num)
    np.testing.assert_array_equal(pair_P.cpu().numpy(), pairs)
    np.testing.assert_array_equal(place_RK.cpu().numpy().reshape(-1), places)
    np.testing.assert_array_equal(ends_S.cpu().numpy(), counts.cumsum())
    np.testing.assert_array_equal(counter_S.cpu().numpy(), counts + 5)


def test_pairs_are_sorted_by_slot_then_row(cuda: torch.device) -> None:
    check(cuda, SHAPES + LARGE + MANY_SLOTS)


def test_what_cannot_be_sorted_is_refused() -> None:
    pytest.importorskip("triton")
    from experts.kernels.sort_by_slot import sort_by_slot

    with pytest.raises(ValueError, match="int32 or int64"):
        sort_by_slot(torch.zeros(3, 2), 4)
    with pytest.raises(ValueError, match=r"int64 \[4\]"):
        sort_by_slot(torch.zeros(3, 2, dtype=torch.int32), 4, counter_S=torch.zeros(3))
