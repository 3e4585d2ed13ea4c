# ruff: noqa: ANN001, ANN201  (what Triton compiles has no Python types)
"""Rows between nodes: packed once, and node sums added up.

Legend: T my tokens, N rows per source, M nodes, H hidden, K top-k, B blocks of 128 channels.

A row crosses as a record of 32-bit words (`comms/rail_record.py`): channels, scales, slots, weights,
range. Row t of the source at node m has its place at m * N + t of every rail, whoever needs it; records
of rows that a node does not need have the slots -1 and are never read further. Each kernel also counts
(`comms/kernels/progress.py`).
"""

import triton
import triton.language as tl

from comms.kernels.dispatch import quantised
from comms.kernels.fixed import from_steps
from comms.kernels.progress import book_rows, tell_host

_BLOCK = tl.constexpr(128)


@triton.jit(do_not_specialize=["num_tokens", "num_rows", "num_crossing", "node"])  # type: ignore[untyped-decorator,unused-ignore]
def pack_rows(  # type: ignore[no-untyped-def]
    records, x, slots, weights, ranges, places, told, count, num_tokens, num_rows, num_crossing,
    node, NODES: tl.constexpr, SLOTS_PER_NODE: tl.constexpr, H: tl.constexpr, K: tl.constexpr,
    PADDED_H: tl.constexpr, PADDED_K: tl.constexpr, RECORD: tl.constexpr, SCALES_AT: tl.constexpr,
    SLOTS_AT: tl.constexpr, FLOAT8: tl.constexpr, RANGED: tl.constexpr, PLACED: tl.constexpr,
):  # fmt: skip
    """One program per row: read once, quantised if asked to, stored once for every node that needs it.

    records int32 [2, M, N, RECORD]: [1, m] is what goes to node m, [0, node] what stays.
    x bf16 [T, H], slots int [T, K], weights fp32 [T, K], ranges fp32 [T]. places int32 [M, N], PLACED:
    where among those of node m my row has its place, -1 where it has none; who placed them has told.
    num_crossing: records that go to other nodes.
    """
    row = tl.program_id(0)
    k = tl.arange(0, PADDED_K)
    entry = row * K + k
    slot_K = tl.load(slots + entry, mask=k < tl.where(row < num_tokens, K, 0), other=-1)
    slot_K = slot_K.to(tl.int32)
    node_K = tl.where(slot_K >= 0, slot_K // SLOTS_PER_NODE, -1)
    goes = tl.max(slot_K, 0) >= 0
    width = tl.where(goes, H, 0)
    weight_K = tl.load(weights + entry, mask=k < tl.where(goes, K, 0), other=0.0)
    token_range = tl.load(ranges + row, mask=goes, other=0.0)
    at = tl.cast(row, tl.int64) * H
    if FLOAT8:
        q, scale, channel, block = quantised(x + at, width, PADDED_H)
    else:
        channel = tl.arange(0, PADDED_H)
        x_H = tl.load(x + at + channel, mask=channel < width, other=0.0)
    for m in tl.static_range(NODES):
        is_there = tl.max((node_K == m).to(tl.int32), 0) != 0
        place = tl.load(places + m * num_rows + row) if PLACED else row
        half = tl.where(m == node, 0, NODES)
        record = records + (tl.cast(half + m, tl.int64) * num_rows + place) * RECORD
        to_slots = record + SLOTS_AT + k
        tl.store(to_slots, tl.where(is_there, slot_K, -1), mask=k < tl.where(place >= 0, K, 0))
        if is_there:
            if FLOAT8:
                tl.store(record.to(tl.pointer_type(tl.float8e4nv)) + channel, q, mask=channel < H)
                to_scale = (record + SCALES_AT).to(tl.pointer_type(tl.float32))
                tl.store(to_scale + block, scale, mask=block < H // _BLOCK)
            else:
                tl.store(record.to(tl.pointer_type(tl.bfloat16)) + channel, x_H, mask=channel < H)
            floats = (record + SLOTS_AT + K).to(tl.pointer_type(tl.float32))
            tl.store(floats + k, weight_K, mask=k < K)
            if RANGED:
                tl.store(floats + K, token_range)
    book_rows(count, num_crossing, RECORD * 4)
    if not PLACED:
        tell_host(told, count)


@triton.jit(do_not_specialize=["num_tokens", "num_rows", "num_crossing", "node"])  # type: ignore[untyped-decorator,unused-ignore]
def add_nodes(  # type: ignore[no-untyped-def]
    out, extra, slots, ranges, mine, theirs, places, told, count, num_tokens, num_rows, num_crossing,
    node, NODES: tl.constexpr, SLOTS_PER_NODE: tl.constexpr, H: tl.constexpr, K: tl.constexpr,
    BLOCK_H: tl.constexpr, PADDED_K: tl.constexpr, COLUMNS: tl.constexpr, FIXED: tl.constexpr,
    EXTRA: tl.constexpr, PLACED: tl.constexpr,
):  # fmt: skip
    """out bf16 [T, H]: each token's sums of the nodes that have one, added in node order.

    mine, theirs [M, N, COLUMNS]: the sums for my tokens that this node made, at [node], and those that
    came back from node m, at [m]; bf16, or FIXED int32 with column H not 0 where a pair was refused.
    num_crossing: sums that went to other nodes meanwhile.
    """
    num_blocks: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H
    token, block = tl.program_id(0) // num_blocks, tl.program_id(0) % num_blocks
    is_token = token < num_tokens
    channel = block * BLOCK_H + tl.arange(0, BLOCK_H)
    k = tl.arange(0, PADDED_K)
    slot_K = tl.load(slots + token * K + k, mask=k < tl.where(is_token, K, 0), other=-1)
    slot_K = slot_K.to(tl.int32)
    node_K = tl.where(slot_K >= 0, slot_K // SLOTS_PER_NODE, -1)
    total_H = tl.zeros([BLOCK_H], tl.int32 if FIXED else tl.float32)
    refused = 0
    for m in tl.static_range(NODES):
        is_there = tl.max((node_K == m).to(tl.int32), 0) != 0
        place = tl.load(places + m * num_rows + token, mask=is_there, other=0) if PLACED else token
        at = (tl.cast(m * num_rows, tl.int64) + place) * COLUMNS
        is_mine, is_theirs = is_there & (m == node), is_there & (m != node)
        width = tl.where(is_mine, H, 0)
        mine_H = tl.load(mine + at + channel, mask=channel < width, other=0)
        width = tl.where(is_theirs, H, 0)
        theirs_H = tl.load(theirs + at + channel, mask=channel < width, other=0)
        if FIXED:
            total_H += mine_H + theirs_H
            refused = refused | tl.load(mine + at + H, mask=is_mine, other=0)
            refused = refused | tl.load(theirs + at + H, mask=is_theirs, other=0)
        else:
            total_H += tl.where(is_mine, mine_H, theirs_H).to(tl.float32)
    if FIXED:
        token_range = tl.load(ranges + token, mask=is_token, other=0.0)
        out_H = from_steps(total_H, refused != 0, token_range)
    else:
        out_H = total_H.to(tl.bfloat16)
    at = tl.cast(token, tl.int64) * H + channel
    width = tl.where(is_token, H, 0)
    if EXTRA:
        extra_H = tl.load(extra + at, mask=channel < width, other=0.0)
        out_H = (out_H.to(tl.float32) + extra_H.to(tl.float32)).to(tl.bfloat16)
    tl.store(out + at, out_H, mask=channel < width)
    book_rows(count, num_crossing, COLUMNS * (4 if FIXED else 2))
    tell_host(told, count)
