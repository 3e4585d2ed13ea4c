# ruff: noqa: ANN001, ANN201  (what Triton compiles has no Python types)
"""Rows that came from other nodes: to the ranks of this node that need them, as they are.

Legend: N rows per source, M nodes, V = M * N rows on my rail, H hidden, K top-k, B blocks of 128 channels.
"""

import triton
import triton.language as tl

from comms.kernels.progress import tell_host
from comms.kernels.regions import DISPATCHED, RANGES, ROWS, SCALES, SLOTS, WEIGHTS, address
from comms.kernels.signals import GIVEN, SENT, meet_peers, word_of

_BLOCK = tl.constexpr(128)
_GIVEN, _SENT = tl.constexpr(GIVEN), tl.constexpr(SENT)


@triton.jit(do_not_specialize=["num_rows", "rows_of_source", "node", "rank", "deadline_ns"])  # type: ignore[untyped-decorator,unused-ignore]
def forward_rows(  # type: ignore[no-untyped-def]
    local_slots, records, arrived, table, state, failed, report, told, count, num_rows,
    rows_of_source, node, rank, deadline_ns, WORLD: tl.constexpr, SLOTS_PER_RANK: tl.constexpr,
    H: tl.constexpr, K: tl.constexpr, PADDED_K: tl.constexpr, PADDED_WORDS: tl.constexpr,
    RECORD: tl.constexpr, SCALES_AT: tl.constexpr, SLOTS_AT: tl.constexpr, ROW_BYTES: tl.constexpr,
    FLOAT8: tl.constexpr, RANGED: tl.constexpr, COUNTED: tl.constexpr, SIGNALS: tl.constexpr,
    WAITS: tl.constexpr,
):  # fmt: skip
    """`dispatch_rows` of `comms/kernels/dispatch.py` for the V records of my rail: words go on unchanged.

    local_slots int32 [V, K], written: the slots among this node's, -1 for those of others. records
    int32 [V, RECORD]; num_rows is V, rows_of_source N. arrived int32 [M], COUNTED: how many records of
    each node there are.
    """
    k = tl.arange(0, PADDED_K)
    word = tl.arange(0, PADDED_WORDS)
    program = tl.program_id(0)
    given = tl.load(word_of(state, _GIVEN, program))
    num_bytes = tl.load(word_of(state, _SENT, program))
    for i in range(program, num_rows, tl.num_programs(0)):
        row = tl.cast(i, tl.int32)
        num_bytes += (WORLD - 1) * K * 4
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
            tl.store(address(table, SLOTS, to, WORLD) + place * K + k, local_K, mask=k < K)
            if tl.max(is_there_K.to(tl.int32), 0) != 0:
                to_row = address(table, ROWS, to, WORLD) + place * SCALES_AT
                tl.store(to_row + word, row_words, mask=word < SCALES_AT)
                if FLOAT8:
                    to_scale = address(table, SCALES, to, WORLD) + place * (H // _BLOCK)
                    tl.store(to_scale + block, scale_words, mask=block < H // _BLOCK)
                to_weights = address(table, WEIGHTS, to, WORLD) + place * K
                tl.store(to_weights + k, weights_K, mask=k < K)
                if RANGED:
                    to_range = address(table, RANGES, to, WORLD) + place
                    tl.store(to_range, tl.load(record + SLOTS_AT + 2 * K))
                if next < WORLD:
                    num_bytes += ROW_BYTES
    tl.store(word_of(state, _SENT, program), num_bytes)
    tell_host(told, count)
    if SIGNALS:
        meet_peers(
            table + DISPATCHED * WORLD, state, given, num_rows, failed, report, deadline_ns, rank,
            WORLD, WAITS,
        )  # fmt: skip
