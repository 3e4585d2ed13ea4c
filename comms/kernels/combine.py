# ruff: noqa: ANN001, ANN201  (what Triton compiles has no Python types)
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

from comms.kernels.combine_sums import add_sums, my_sum, send_sum
from comms.kernels.regions import COMBINED
from comms.kernels.signals import AWAITED, GIVEN, SENT, signal_peers, wait_for_peers, word_of

_GIVEN, _AWAITED, _SENT = tl.constexpr(GIVEN), tl.constexpr(AWAITED), tl.constexpr(SENT)


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
    between two signals. state: see `comms/kernels/signals.py`.
    SENDS, ADDS: both, or one alone. SPLIT: by one half of the programs each.
    """
    flags = table + COMBINED * WORLD
    num_blocks: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H
    num_twins = tl.num_programs(0) // 2 if SPLIT else tl.num_programs(0)
    program = tl.program_id(0) % num_twins
    num_chunks = tl.cdiv(num_rows * num_blocks, num_twins * chunk)
    if SENDS and (not SPLIT or tl.program_id(0) < num_twins):
        given = tl.load(word_of(state, _GIVEN, program))
        num_bytes = tl.load(word_of(state, _SENT, program))
        for c in range(num_chunks):
            for i in range(chunk):
                unit = program + (c * chunk + i) * num_twins
                if unit < num_rows * num_blocks:
                    for next in range(1, WORLD):
                        num_bytes += send_sum(
                            y, places, local_slots, weights, ranges, table, unit // num_blocks,
                            unit % num_blocks, num_rows, rank, (rank + next) % WORLD, limit, WORLD,
                            H, K, BLOCK_H, PADDED_K, SUMMED, FIXED, PART,
                        )  # fmt: skip
            if SIGNALS:
                signal_peers(flags, program, given + c + 1, num_rows, rank, WORLD)
        tl.store(word_of(state, _GIVEN, program), given + num_chunks)
        tl.store(word_of(state, _SENT, program), num_bytes)
    if ADDS and (not SPLIT or tl.program_id(0) >= num_twins):
        awaited = tl.load(word_of(state, _AWAITED, program))
        for c in range(num_chunks):
            for i in range(chunk):
                unit = program + (c * chunk + i) * num_twins
                token, block = unit // num_blocks, unit % num_blocks
                is_mine = token < num_tokens
                # What needs no peer comes before the wait.
                mine_H, form = my_sum(
                    y, places, weights, ranges, tl.where(is_mine, token, 0), block, is_mine,
                    num_rows, rank, limit, H, K, BLOCK_H, SUMMED, FIXED, PART,
                )  # fmt: skip
                if SIGNALS and i == 0:
                    wait_for_peers(
                        flags, program, awaited + c + 1, num_rows, failed, report, deadline_ns,
                        rank, WORLD,
                    )  # fmt: skip
                if is_mine:
                    add_sums(
                        out, extra, slots, my_ranges, mine_H, form, table, token, block, num_rows,
                        rank, WORLD, SLOTS_PER_RANK, H, K, BLOCK_H, PADDED_K, FIXED, EXTRA, PART,
                        COLUMNS,
                    )  # fmt: skip
        tl.store(word_of(state, _AWAITED, program), awaited + num_chunks)
