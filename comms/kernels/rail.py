# ruff: noqa: ANN001, ANN201, ANN202  (what Triton compiles has no Python types)
"""Rows between nodes: packed once, forwarded inside the receiving node as they are, node sums added up.

Legend: T my tokens, N rows per source, M nodes, V = M * N rows on my rail, R ranks of a node, H hidden,
K top-k, B blocks of 128 channels.

A row crosses as a record of 32-bit words (`comms/rail_record.py`): channels, scales, slots, weights,
range. Row t of the source at node m has its place at m * N + t of every rail, whoever needs it; records
of rows that a node does not need have the slots -1 and are never read further.

Each kernel also counts: `count` on the device, `told` in memory of the host, where a thread sees how far
the GPU has come (`comms/rail_watch.py`).
"""

import triton
import triton.language as tl

from comms.kernels.dispatch import _address, _quantised
from comms.kernels.signals import signal_peers, wait_for_peers

_ROWS, _SCALES, _SLOTS = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
_WEIGHTS, _RANGES, _DISPATCHED = tl.constexpr(3), tl.constexpr(4), tl.constexpr(8)
_BLOCK = tl.constexpr(128)
_STEPS = tl.constexpr(32768.0)  # of bfloat16 from zero to the range


@triton.jit(do_not_specialize=["num_tokens", "num_rows", "node"])  # type: ignore[untyped-decorator,unused-ignore]
def pack_rows(  # type: ignore[no-untyped-def]
    records, x, slots, weights, ranges, places, told, count, num_tokens, num_rows, node,
    NODES: tl.constexpr, SLOTS_PER_NODE: tl.constexpr, H: tl.constexpr, K: tl.constexpr,
    PADDED_H: tl.constexpr, PADDED_K: tl.constexpr, RECORD: tl.constexpr, SCALES_AT: tl.constexpr,
    SLOTS_AT: tl.constexpr, FLOAT8: tl.constexpr, RANGED: tl.constexpr, PLACED: tl.constexpr,
):  # fmt: skip
    """One program per row: read once, quantised if asked to, stored once for every node that needs it.

    records int32 [2, M, N, RECORD]: [1, m] is what goes to node m, [0, node] what stays.
    x bf16 [T, H], slots int [T, K], weights fp32 [T, K], ranges fp32 [T]. places int32 [M, N], PLACED:
    where among those of node m my row has its place, -1 where it has none; who placed them has told.
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
        q, scale, channel, block = _quantised(x + at, width, PADDED_H)
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
    if not PLACED:
        _tell(told, count)


@triton.jit(do_not_specialize=["num_rows", "rows_of_source", "node", "rank", "deadline_ns"])  # type: ignore[untyped-decorator,unused-ignore]
def forward_rows(  # type: ignore[no-untyped-def]
    local_slots, records, arrived, table, state, failed, report, told, count, num_rows,
    rows_of_source, node, rank, deadline_ns, WORLD: tl.constexpr, SLOTS_PER_RANK: tl.constexpr,
    H: tl.constexpr, K: tl.constexpr, PADDED_K: tl.constexpr, PADDED_WORDS: tl.constexpr,
    RECORD: tl.constexpr, SCALES_AT: tl.constexpr, SLOTS_AT: tl.constexpr, FLOAT8: tl.constexpr,
    RANGED: tl.constexpr, COUNTED: tl.constexpr, SIGNALS: tl.constexpr, WAITS: tl.constexpr,
):  # fmt: skip
    """`dispatch_rows` of `comms/kernels/dispatch.py` for the V records of my rail: words go on unchanged.

    local_slots int32 [V, K], written: the slots among this node's, -1 for those of others. records
    int32 [V, RECORD]; num_rows is V, rows_of_source N. arrived int32 [M], COUNTED: how many records of
    each node there are.
    """
    k = tl.arange(0, PADDED_K)
    word = tl.arange(0, PADDED_WORDS)
    for i in range(tl.program_id(0), num_rows, tl.num_programs(0)):
        row = tl.cast(i, tl.int32)
        record = records + tl.cast(row, tl.int64) * RECORD
        is_record = True
        if COUNTED:
            is_record = row % rows_of_source < tl.load(arrived + row // rows_of_source)
        slot_K = tl.load(record + SLOTS_AT + k, mask=k < tl.where(is_record, K, 0), other=-1)
        mine_K = slot_K - node * (WORLD * SLOTS_PER_RANK)
        is_mine_K = (slot_K >= 0) & (mine_K >= 0) & (mine_K < WORLD * SLOTS_PER_RANK)
        mine_K = tl.where(is_mine_K, mine_K, -1)
        tl.store(local_slots + tl.cast(row, tl.int64) * K + k, mine_K, mask=k < K)
        rank_K = tl.where(mine_K >= 0, mine_K // SLOTS_PER_RANK, -1)
        goes = tl.max(mine_K, 0) >= 0
        row_words = tl.load(record + word, mask=word < tl.where(goes, SCALES_AT, 0), other=0)
        block = tl.arange(0, PADDED_WORDS // 32)
        scale_words = tl.load(
            record + SCALES_AT + block,
            mask=block < tl.where(goes, SLOTS_AT - SCALES_AT, 0), other=0,
        )  # fmt: skip
        weights_K = tl.load(
            record + SLOTS_AT + K + k, mask=k < tl.where(goes, K, 0), other=0
        )  # fmt: skip
        place = tl.cast(rank, tl.int64) * num_rows + row
        for next in tl.static_range(1, WORLD + 1):
            to = (rank + next) % WORLD
            is_there_K = (rank_K == to) & (k < K)
            local_K = tl.where(is_there_K, mine_K - to * SLOTS_PER_RANK, -1)
            tl.store(_address(table, _SLOTS, to, WORLD) + place * K + k, local_K, mask=k < K)
            if tl.max(is_there_K.to(tl.int32), 0) != 0:
                to_row = _address(table, _ROWS, to, WORLD) + place * SCALES_AT
                tl.store(to_row + word, row_words, mask=word < SCALES_AT)
                if FLOAT8:
                    to_scale = _address(table, _SCALES, to, WORLD) + place * (H // _BLOCK)
                    tl.store(to_scale + block, scale_words, mask=block < H // _BLOCK)
                to_weights = _address(table, _WEIGHTS, to, WORLD) + place * K
                tl.store(to_weights + k, weights_K, mask=k < K)
                if RANGED:
                    to_range = _address(table, _RANGES, to, WORLD) + place
                    tl.store(to_range, tl.load(record + SLOTS_AT + 2 * K))
    _tell(told, count)
    if SIGNALS:
        program = tl.program_id(0)
        flags, given = table + _DISPATCHED * WORLD, tl.load(state + program) + 1
        tl.store(state + program, given)
        signal_peers(flags, program, given, num_rows, rank, WORLD)
        if WAITS:
            wait_for_peers(
                flags, program, given, num_rows, failed, report, deadline_ns, rank, WORLD
            )


@triton.jit(do_not_specialize=["num_tokens", "num_rows", "node"])  # type: ignore[untyped-decorator,unused-ignore]
def add_nodes(  # type: ignore[no-untyped-def]
    out, extra, slots, ranges, mine, theirs, places, told, count, num_tokens, num_rows, node,
    NODES: tl.constexpr, SLOTS_PER_NODE: tl.constexpr, H: tl.constexpr, K: tl.constexpr,
    BLOCK_H: tl.constexpr, PADDED_K: tl.constexpr, COLUMNS: tl.constexpr, FIXED: tl.constexpr,
    EXTRA: tl.constexpr, PLACED: tl.constexpr,
):  # fmt: skip
    """out bf16 [T, H]: each token's sums of the nodes that have one, added in node order.

    mine, theirs [M, N, COLUMNS]: the sums for my tokens that this node made, at [node], and those that
    came back from node m, at [m]; bf16, or FIXED int32 with column H not 0 where a pair was refused.
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
        step = tl.load(ranges + token, mask=is_token, other=0.0) * (1.0 / _STEPS)
        out_H = (total_H.to(tl.float32) * tl.where(refused != 0, float("nan"), step)).to(
            tl.bfloat16
        )
    else:
        out_H = total_H.to(tl.bfloat16)
    at = tl.cast(token, tl.int64) * H + channel
    width = tl.where(is_token, H, 0)
    if EXTRA:
        extra_H = tl.load(extra + at, mask=channel < width, other=0.0)
        out_H = (out_H.to(tl.float32) + extra_H.to(tl.float32)).to(tl.bfloat16)
    tl.store(out + at, out_H, mask=channel < width)
    _tell(told, count)


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def tell(told, count):  # type: ignore[no-untyped-def]
    """Of one program: an exchange begins."""
    _tell(told, count)


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _tell(told, count):  # type: ignore[no-untyped-def]
    """One more kernel of the exchange has come this far."""
    if tl.program_id(0) == 0:
        now = tl.load(count) + 1
        tl.store(count, now)
        tl.store(told, now)
