# ruff: noqa: ANN001, ANN202  (what Triton compiles has no Python types)
"""Sort (row, k) pairs by slot on the device: a stable counting sort.

One program has the pairs of one slot, or of a few, among those of one part of the list. A slot's first
place there is the number of all pairs of lower slots, and of its own in the parts before; a running sum
numbers the rest. A short list is one part, whose pairs every program counts for itself: one launch. Of
a long one another launch counts before. Programs share nothing and wait for nobody, so the order is
that of the flat index whatever runs first.

R rows, K experts per token, P = R * K pairs, S slots, C parts.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from experts.kernels.early import early, let_next_start, wait_for_inputs
from experts.kernels.types import SortedPairs

_WHOLE = 4096
"""Most pairs of one launch; from there on, two are faster."""
_PARTS_OF_1024 = 16  # a longer list has larger parts
_PAIRS_OF_A_WARP = 512
_FEW_SLOTS = 16  # with more, a program has several


def sort_by_slot(
    slots_RK: Tensor, num_slots: int, *, counter_S: Tensor | None = None
) -> SortedPairs:
    """The pairs of slots 0 .. num_slots - 1 of int32 or int64 `slots_RK`; others (-1) are not here.

    `counter_S` int64 [S], if given, is increased by each slot's pairs. Raises ValueError for shapes
    and dtypes that cannot be.
    """
    if slots_RK.dim() != 2 or slots_RK.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"slots {slots_RK.dtype} {list(slots_RK.shape)} are not int32 or int64 [R, K]"
        )
    if counter_S is not None and (
        counter_S.dtype != torch.int64 or tuple(counter_S.shape) != (num_slots,)
    ):
        raise ValueError(
            f"counter {counter_S.dtype} {list(counter_S.shape)} is not int64 [{num_slots}]"
        )
    slots_RK, device = slots_RK.contiguous(), slots_RK.device
    num_pairs = slots_RK.numel()
    pair_P = torch.empty(num_pairs, dtype=torch.int32, device=device)
    place_RK = torch.empty(slots_RK.shape, dtype=torch.int32, device=device)
    ends_S = torch.empty(num_slots, dtype=torch.int32, device=device)
    whole = num_pairs <= _WHOLE
    if whole:
        block = max(triton.next_power_of_2(num_pairs), 128)
    else:
        block = 1024 if num_pairs <= _PARTS_OF_1024 * 1024 else 2048
    parts = max(1, triton.cdiv(num_pairs, block))
    slots_each = 4 if not whole and block == 2048 and num_slots > _FEW_SLOTS else 1
    counts_CS = ends_S
    if not whole:
        counts_CS = torch.empty((parts, num_slots), dtype=torch.int32, device=device)
        _count[(parts, triton.cdiv(num_slots, _FEW_SLOTS))](
            slots_RK, counts_CS, num_pairs, num_slots,
            BLOCK=block, SLOTS=_FEW_SLOTS, num_warps=4, **early(device),
        )  # fmt: skip
    _sort[(parts, triton.cdiv(num_slots, slots_each))](
        slots_RK, counts_CS, pair_P, place_RK, ends_S,
        ends_S if counter_S is None else counter_S, num_pairs, num_slots,
        BLOCK=block, WHOLE=whole, PARTS=triton.next_power_of_2(parts),
        SLOTS=1 if whole else triton.next_power_of_2(num_slots), COUNT=counter_S is not None,
        EACH=slots_each, num_warps=min(max(block // _PAIRS_OF_A_WARP, 4), 8), **early(device),
    )  # fmt: skip
    return SortedPairs(pair_P=pair_P, place_RK=place_RK, ends_S=ends_S)


@triton.jit(do_not_specialize=["num_pairs", "num_slots"])  # type: ignore[untyped-decorator,unused-ignore]
def _count(  # type: ignore[no-untyped-def]
    slots, counts_out, num_pairs, num_slots,
    BLOCK: tl.constexpr, SLOTS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """How many pairs of one part each of a few slots has."""
    wait_for_inputs(EARLY)
    let_next_start(EARLY)
    part, first = tl.program_id(0), tl.program_id(1) * SLOTS
    at = part * BLOCK + tl.arange(0, BLOCK)
    found = tl.load(slots + at, mask=at < num_pairs, other=-1).to(tl.int32)
    for i in tl.static_range(SLOTS):
        slot = first + i
        number = tl.sum((found == slot).to(tl.int32), 0)
        tl.store(counts_out + part * num_slots + slot, number, mask=slot < num_slots)


@triton.jit(do_not_specialize=["num_pairs", "num_slots"])  # type: ignore[untyped-decorator,unused-ignore]
def _sort(  # type: ignore[no-untyped-def]
    slots, counts, pair_out, place_out, ends_out, counter, num_pairs, num_slots,
    BLOCK: tl.constexpr, WHOLE: tl.constexpr, PARTS: tl.constexpr, SLOTS: tl.constexpr,
    COUNT: tl.constexpr, EACH: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(EARLY)
    let_next_start(EARLY)
    part = tl.program_id(0)
    at = part * BLOCK + tl.arange(0, BLOCK)
    inside = at < num_pairs
    found = tl.load(slots + at, mask=inside, other=-1).to(tl.int32)
    found = tl.where(found < num_slots, found, -1)
    if not WHOLE:
        parts, slot = tl.arange(0, PARTS)[:, None], tl.arange(0, SLOTS)[None, :]
        here = (parts < tl.num_programs(0)) & (slot < num_slots)
        counted = tl.load(counts + parts * num_slots + slot, mask=here, other=0)
        all_S = tl.sum(counted, 0)
        before_S = tl.sum(tl.where(parts < part, counted, 0), 0)
        slot_S = tl.arange(0, SLOTS)
    for i in tl.static_range(EACH):
        mine = tl.program_id(1) * EACH + i
        number = (found == mine).to(tl.int32)
        if WHOLE:
            lower = tl.sum(((found >= 0) & (found < mine)).to(tl.int32), 0)
            before, own = 0, tl.sum(number, 0)
        else:
            lower = tl.sum(tl.where(slot_S < mine, all_S, 0), 0)
            before = tl.sum(tl.where(slot_S == mine, before_S, 0), 0)
            own = tl.sum(tl.where(slot_S == mine, all_S, 0), 0)
        place = lower + before + tl.cumsum(number, 0) - number
        tl.store(place_out + at, place, mask=number > 0)
        tl.store(pair_out + place, at, mask=number > 0)
        end = lower + own
        if mine == 0:  # somebody has to say which pairs are not here,
            tl.store(place_out + at, -1, mask=(found < 0) & inside)
        if mine == num_slots - 1:  # and which places nobody has
            tl.store(pair_out + at, -1, mask=(at >= end) & inside)
        if (part == 0) & (mine < num_slots):
            tl.store(ends_out + mine, end)
            if COUNT:
                tl.store(counter + mine, tl.load(counter + mine) + own)
