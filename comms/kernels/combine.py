# ruff: noqa: ANN001, ANN201, ANN202  (what Triton compiles has no Python types)
"""Expert outputs on their way home: one sum per token and rank, stored where the token came from.

Legend: R received rows (W ranks of N rows each), T my tokens, P pairs, H hidden, K top-k, W ranks.

For every row that another rank sent, the weighted outputs of the experts here are added up, in top-k
order, and the sum is stored into that rank's memory; for every token of mine the ranks' sums are added,
in rank order. Of many rows, one half of the programs sends and the other half adds what its twins have
sent, chunk by chunk, so that the link and the memory work at the same time; senders come first and wait
for nobody. Of few rows, every program first sends and then adds. Products and sums are rounded one by
one (no fused multiply-add), as `comms/reference.py` does.

Two ways to add:

    node   fp32 sums, rounded once to bfloat16 to be sent; the end is fp32 again, cast to bfloat16
    fixed  integers on the token's grid (`comms/fixed.py`), sent as int16 if the row's all fit, else as
           int32 into a region of their own; FORMS says which, or that a pair was refused (a NaN row)

In a node of several (PART) the sum is not finished: "node" partials travel in fp32 and their sum is rounded
once; "fixed" gives the integers, with a column that says whether a pair was refused.
"""

import triton
import triton.language as tl

from comms.kernels.dispatch import _address
from comms.kernels.fixed import fixed_partial
from comms.kernels.signals import signal_peers, wait_for_peers
from comms.symmetric_layout import PROGRAMS

_PARTIALS, _WIDE, _FORMS, _COMBINED = (
    tl.constexpr(5), tl.constexpr(6), tl.constexpr(7), tl.constexpr(9),
)  # fmt: skip
_MAX_PROGRAMS = tl.constexpr(PROGRAMS)
_STEPS = tl.constexpr(32768.0)  # of bfloat16 from zero to the range
_IS_NARROW, _IS_WIDE, _IS_REFUSED = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit(do_not_specialize=["num_tokens", "num_rows", "rank", "chunk", "deadline_ns"])  # type: ignore[untyped-decorator,unused-ignore]
def combine_rows(  # type: ignore[no-untyped-def]
    out, extra, slots, my_ranges, y, places, local_slots, weights, ranges, table, state, failed,
    report, num_tokens, num_rows, rank, chunk, limit, deadline_ns,
    WORLD: tl.constexpr, SLOTS_PER_RANK: tl.constexpr, H: tl.constexpr, K: tl.constexpr,
    BLOCK_H: tl.constexpr, PADDED_K: tl.constexpr, SUMMED: tl.constexpr, FIXED: tl.constexpr,
    EXTRA: tl.constexpr, SENDS: tl.constexpr, ADDS: tl.constexpr, SPLIT: tl.constexpr,
    SIGNALS: tl.constexpr, PART: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """out [T, COLUMNS]: of my tokens, with slots int [T, K] and my_ranges fp32 [T] as I sent them; bf16, but
    for integers of a PART.

    y bf16: [P, H], with places int32 [R, K] of the pairs; or, SUMMED, [R, H], one sum per row.
    local_slots int32 [R, K], weights fp32 [R, K], ranges fp32 [R]: as received; num_rows: N.
    extra bf16 [T, H]: added to the result in bfloat16. BLOCK_H: channels that a program works on at a
    time; all for combine "fixed", where they say together whether a row fits. chunk: how often it does
    between two signals. state: signals given and signals awaited, each int64 [PROGRAMS].
    SENDS, ADDS: both, or one alone. SPLIT: by one half of the programs each.
    """
    flags = table + _COMBINED * WORLD
    num_blocks: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H
    num_twins = tl.num_programs(0) // 2 if SPLIT else tl.num_programs(0)
    program = tl.program_id(0) % num_twins
    num_chunks = tl.cdiv(num_rows * num_blocks, num_twins * chunk)
    if SENDS and (not SPLIT or tl.program_id(0) < num_twins):
        given = tl.load(state + program)
        for c in range(num_chunks):
            for i in range(chunk):
                unit = program + (c * chunk + i) * num_twins
                if unit < num_rows * num_blocks:
                    for next in range(1, WORLD):
                        _send_sum(
                            y, places, local_slots, weights, ranges, table, unit // num_blocks,
                            unit % num_blocks, num_rows, rank, (rank + next) % WORLD, limit, WORLD,
                            H, K, BLOCK_H, PADDED_K, SUMMED, FIXED, PART,
                        )  # fmt: skip
            if SIGNALS:
                signal_peers(flags, program, given + c + 1, num_rows, rank, WORLD)
        tl.store(state + program, given + num_chunks)
    if ADDS and (not SPLIT or tl.program_id(0) >= num_twins):
        counter = state + _MAX_PROGRAMS + program
        awaited = tl.load(counter)
        for c in range(num_chunks):
            for i in range(chunk):
                unit = program + (c * chunk + i) * num_twins
                token, block = unit // num_blocks, unit % num_blocks
                is_mine = token < num_tokens
                # What needs no peer comes before the wait.
                mine_H, form = _my_sum(
                    y, places, weights, ranges, tl.where(is_mine, token, 0), block, is_mine,
                    num_rows, rank, limit, H, K, BLOCK_H, SUMMED, FIXED, PART,
                )  # fmt: skip
                if SIGNALS and i == 0:
                    wait_for_peers(
                        flags, program, awaited + c + 1, num_rows, failed, report, deadline_ns,
                        rank, WORLD,
                    )  # fmt: skip
                if is_mine:
                    _add_sums(
                        out, extra, slots, my_ranges, mine_H, form, table, token, block, num_rows,
                        rank, WORLD, SLOTS_PER_RANK, H, K, BLOCK_H, PADDED_K, FIXED, EXTRA, PART,
                        COLUMNS,
                    )  # fmt: skip
        tl.store(counter, awaited + num_chunks)


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _send_sum(  # type: ignore[no-untyped-def]
    y, places, local_slots, weights, ranges, table, token, block, num_rows, rank, to, limit,
    WORLD: tl.constexpr, H: tl.constexpr, K: tl.constexpr, BLOCK_H: tl.constexpr,
    PADDED_K: tl.constexpr, SUMMED: tl.constexpr, FIXED: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """Some channels of one row's sum to the rank `to`, if any of its pairs are here."""
    channel = block * BLOCK_H + tl.arange(0, BLOCK_H)
    k = tl.arange(0, PADDED_K)
    row = tl.cast(to, tl.int64) * num_rows + token
    there = tl.cast(rank, tl.int64) * num_rows + token
    slot_K = tl.load(local_slots + row * K + k, mask=k < K, other=-1)
    if tl.max(slot_K, 0) >= 0:
        narrow_to = _address(table, _PARTIALS, to, WORLD)
        if FIXED:
            total_H, form = fixed_partial(
                y, places, weights, ranges, row, True, limit, H, K, BLOCK_H
            )
            forms = _address(table, _FORMS, to, WORLD).to(tl.pointer_type(tl.int32))
            tl.store(forms + there, form)
            if form == _IS_NARROW:
                narrow = narrow_to.to(tl.pointer_type(tl.int16))
                tl.store(narrow + there * H + channel, total_H.to(tl.int16), mask=channel < H)
            if form == _IS_WIDE:
                wide = _address(table, _WIDE, to, WORLD).to(tl.pointer_type(tl.int32))
                tl.store(wide + there * H + channel, total_H, mask=channel < H)
        else:
            if SUMMED:
                sum_H = tl.load(y + row * H + channel, mask=channel < H, other=0.0)
            else:
                sum_H = _node_partial(y, places, weights, row, True, channel, H, K, BLOCK_H)
            if PART:
                wide = _address(table, _WIDE, to, WORLD).to(tl.pointer_type(tl.float32))
                tl.store(wide + there * H + channel, sum_H.to(tl.float32), mask=channel < H)
            else:
                narrow = narrow_to.to(tl.pointer_type(tl.bfloat16))
                tl.store(narrow + there * H + channel, sum_H.to(tl.bfloat16), mask=channel < H)


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _my_sum(  # type: ignore[no-untyped-def]
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
def _add_sums(  # type: ignore[no-untyped-def]
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
    partials = _address(table, _PARTIALS, rank, WORLD)
    if FIXED:
        wide = _address(table, _WIDE, rank, WORLD).to(tl.pointer_type(tl.int32))
        forms = _address(table, _FORMS, rank, WORLD).to(tl.pointer_type(tl.int32))
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
            step = tl.load(my_ranges + token) * (1.0 / _STEPS)
            out_H = (total_H.to(tl.float32) * tl.where(refused, float("nan"), step)).to(tl.bfloat16)
    else:
        if PART:
            theirs = _address(table, _WIDE, rank, WORLD).to(tl.pointer_type(tl.float32))
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
