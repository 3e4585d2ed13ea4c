# ruff: noqa: ANN001, ANN201, ANN202  (what Triton compiles has no Python types)
"""One sum on its way home, and what becomes of those that have arrived: the parts of `comms/kernels/combine.py`.

Legend: as there.
"""

import triton
import triton.language as tl

from comms.kernels.fixed import fixed_partial, from_steps
from comms.kernels.regions import FORMS, PARTIALS, WIDE, address

_IS_NARROW, _IS_WIDE, _IS_REFUSED = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def send_sum(  # type: ignore[no-untyped-def]
    y, places, local_slots, weights, ranges, table, token, block, num_rows, rank, to, limit,
    WORLD: tl.constexpr, H: tl.constexpr, K: tl.constexpr, BLOCK_H: tl.constexpr,
    PADDED_K: tl.constexpr, SUMMED: tl.constexpr, FIXED: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """Some channels of one row's sum to the rank `to`, if any of its pairs are here: so many bytes."""
    channel = block * BLOCK_H + tl.arange(0, BLOCK_H)
    k = tl.arange(0, PADDED_K)
    row = tl.cast(to, tl.int64) * num_rows + token
    there = tl.cast(rank, tl.int64) * num_rows + token
    slot_K = tl.load(local_slots + row * K + k, mask=k < K, other=-1)
    num_bytes = 0
    if tl.max(slot_K, 0) >= 0:
        num_channels = tl.minimum(BLOCK_H, H - block * BLOCK_H)
        narrow_to = address(table, PARTIALS, to, WORLD)
        if FIXED:
            total_H, form = fixed_partial(
                y, places, weights, ranges, row, True, limit, H, K, BLOCK_H
            )
            forms = address(table, FORMS, to, WORLD).to(tl.pointer_type(tl.int32))
            tl.store(forms + there, form)
            if form == _IS_NARROW:
                narrow = narrow_to.to(tl.pointer_type(tl.int16))
                tl.store(narrow + there * H + channel, total_H.to(tl.int16), mask=channel < H)
            if form == _IS_WIDE:
                wide = address(table, WIDE, to, WORLD).to(tl.pointer_type(tl.int32))
                tl.store(wide + there * H + channel, total_H, mask=channel < H)
            width = tl.where(form == _IS_NARROW, 2, tl.where(form == _IS_WIDE, 4, 0))
            num_bytes = 4 + num_channels * width
        else:
            if SUMMED:
                sum_H = tl.load(y + row * H + channel, mask=channel < H, other=0.0)
            else:
                sum_H = _node_partial(y, places, weights, row, True, channel, H, K, BLOCK_H)
            if PART:
                wide = address(table, WIDE, to, WORLD).to(tl.pointer_type(tl.float32))
                tl.store(wide + there * H + channel, sum_H.to(tl.float32), mask=channel < H)
                num_bytes = 4 * num_channels
            else:
                narrow = narrow_to.to(tl.pointer_type(tl.bfloat16))
                tl.store(narrow + there * H + channel, sum_H.to(tl.bfloat16), mask=channel < H)
                num_bytes = 2 * num_channels
    return num_bytes


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def my_sum(  # type: ignore[no-untyped-def]
    y, places, weights, ranges, token, block, is_mine, num_rows, rank, limit, H: tl.constexpr,
    K: tl.constexpr, BLOCK_H: tl.constexpr, SUMMED: tl.constexpr, FIXED: tl.constexpr,
    PART: tl.constexpr,
):  # fmt: skip
    """This rank's part of one of its own tokens (0 if there is none), and its form."""
    channel = block * BLOCK_H + tl.arange(0, BLOCK_H)
    row = tl.cast(rank, tl.int64) * num_rows + token
    if FIXED:
        mine_H, form = fixed_partial(y, places, weights, ranges, row, is_mine, limit, H, K, BLOCK_H)
    else:
        form = 0
        if SUMMED:
            width = tl.where(is_mine, H, 0)
            mine_H = tl.load(y + row * H + channel, mask=channel < width, other=0.0)
        else:
            mine_H = _node_partial(y, places, weights, row, is_mine, channel, H, K, BLOCK_H)
        mine_H = mine_H.to(tl.float32 if PART else tl.bfloat16)
    return mine_H, form


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def add_sums(  # type: ignore[no-untyped-def]
    out, extra, slots, my_ranges, mine_H, my_form, table, token, block, num_rows, rank,
    WORLD: tl.constexpr, SLOTS_PER_RANK: tl.constexpr, H: tl.constexpr, K: tl.constexpr,
    BLOCK_H: tl.constexpr, PADDED_K: tl.constexpr, FIXED: tl.constexpr, EXTRA: tl.constexpr,
    PART: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The result of one of my tokens from what the ranks stored here, and from my own part."""
    channel = block * BLOCK_H + tl.arange(0, BLOCK_H)
    k = tl.arange(0, PADDED_K)
    slot_K = tl.load(slots + token * K + k, mask=k < K, other=-1).to(tl.int32)
    rank_K = tl.where(slot_K >= 0, slot_K // SLOTS_PER_RANK, -1)
    partials = address(table, PARTIALS, rank, WORLD)
    if FIXED:
        wide = address(table, WIDE, rank, WORLD).to(tl.pointer_type(tl.int32))
        forms = address(table, FORMS, rank, WORLD).to(tl.pointer_type(tl.int32))
        narrow = partials.to(tl.pointer_type(tl.int16))
        total_H, refused = mine_H, my_form == _IS_REFUSED
        for r in tl.static_range(WORLD):
            row = tl.cast(r, tl.int64) * num_rows + token
            is_there = (tl.max((rank_K == r).to(tl.int32), 0) != 0) & (r != rank)
            form = tl.load(forms + row, mask=is_there, other=-1)
            width = tl.where(form == _IS_NARROW, H, 0)
            total_H += tl.load(narrow + row * H + channel, mask=channel < width, other=0)
            width = tl.where(form == _IS_WIDE, H, 0)
            total_H += tl.load(wide + row * H + channel, mask=channel < width, other=0)
            refused = refused | (form == _IS_REFUSED)
        if PART:
            out_H = total_H
            tl.store(out + tl.cast(token, tl.int64) * COLUMNS + H, refused.to(tl.int32))
        else:
            out_H = from_steps(total_H, refused, tl.load(my_ranges + token))
    else:
        if PART:
            theirs = address(table, WIDE, rank, WORLD).to(tl.pointer_type(tl.float32))
        else:
            theirs = partials.to(tl.pointer_type(tl.bfloat16))
        is_mine = tl.max((rank_K == rank).to(tl.int32), 0) != 0
        out_H = tl.zeros([BLOCK_H], tl.float32)
        for r in tl.static_range(WORLD):
            row = tl.cast(r, tl.int64) * num_rows + token
            is_there = (tl.max((rank_K == r).to(tl.int32), 0) != 0) & (r != rank)
            width = tl.where(is_there, H, 0)
            part_H = tl.load(theirs + row * H + channel, mask=channel < width, other=0.0)
            # A given sum of a row without slots means nothing.
            part_H = tl.where(is_mine & (r == rank), mine_H, part_H)
            out_H += part_H.to(tl.float32)
        out_H = out_H.to(tl.bfloat16)
    at = tl.cast(token, tl.int64) * COLUMNS + channel
    if EXTRA:
        extra_H = tl.load(extra + at, mask=channel < H, other=0.0)
        out_H = (out_H.to(tl.float32) + extra_H.to(tl.float32)).to(tl.bfloat16)
    tl.store(out + at, out_H, mask=channel < H)


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _node_partial(  # type: ignore[no-untyped-def]
    y, places, weights, row, is_row, channel, H: tl.constexpr, K: tl.constexpr,
    BLOCK_H: tl.constexpr,
):  # fmt: skip
    """fp32: the sum of weight * y over the row's pairs here, 0 if it is none."""
    total_H = tl.zeros([BLOCK_H], tl.float32)
    for k in tl.static_range(K):
        place = tl.load(places + row * K + k, mask=is_row, other=-1)
        weight = tl.load(weights + row * K + k, mask=place >= 0, other=0.0)
        at = tl.cast(place, tl.int64) * H + channel
        width = tl.where(place >= 0, H, 0)
        total_H += tl.load(y + at, mask=channel < width, other=0.0).to(tl.float32) * weight
    return total_H
