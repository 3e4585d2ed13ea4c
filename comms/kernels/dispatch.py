# ruff: noqa: ANN001, ANN201  (what Triton compiles has no Python types)
"""Rows to the ranks of their experts: quantised and stored straight into the receivers' memory.

Legend: T my tokens, H hidden, K top-k, W ranks, N rows per source, B blocks of 128 channels.

One program takes a row at a time: it reads the row once, quantises it if asked to, and stores it on
every rank that has one of its slots, the next rank first and itself last. Row t of rank s has its place
at s * N + t on every receiver, whoever else sends what, so that nobody counts anything and nothing
depends on arrival. Rows that do not go to a rank leave there the slots -1 and nothing else.

float8 is that of `comms/codecs.py`, byte for byte: scale = max(amax, 1e-4) / 448 of 128 channels,
q = e4m3(x / scale), with divisions as IEEE 754 has them; a block with a NaN or an Inf has the scale Inf.
"""

import triton
import triton.language as tl

from comms.kernels.regions import DISPATCHED, RANGES, ROWS, SCALES, SLOTS, WEIGHTS, address
from comms.kernels.signals import GIVEN, SENT, meet_peers, wait_for_peers, word_of

_BLOCK = tl.constexpr(128)
_GIVEN, _SENT = tl.constexpr(GIVEN), tl.constexpr(SENT)


@triton.jit(do_not_specialize=["num_tokens", "num_rows", "rank", "deadline_ns"])  # type: ignore[untyped-decorator,unused-ignore]
def dispatch_rows(  # type: ignore[no-untyped-def]
    x, slots, weights, ranges, table, state, failed, report, num_tokens, num_rows, rank, deadline_ns,
    WORLD: tl.constexpr, SLOTS_PER_RANK: tl.constexpr, H: tl.constexpr,
    K: tl.constexpr, PADDED_H: tl.constexpr, PADDED_K: tl.constexpr, ROW_BYTES: tl.constexpr,
    FLOAT8: tl.constexpr, RANGED: tl.constexpr, SIGNALS: tl.constexpr, WAITS: tl.constexpr,
):  # fmt: skip
    """x bf16 [T, H], slots int [T, K], weights fp32 [T, K], ranges fp32 [T]; num_rows is N >= T.

    state: see `comms/kernels/signals.py`. ROW_BYTES: of a row that goes to a rank, without its slots.
    """
    k = tl.arange(0, PADDED_K)
    program = tl.program_id(0)
    given = tl.load(word_of(state, _GIVEN, program))
    num_bytes = tl.load(word_of(state, _SENT, program))
    for i in range(program, num_rows, tl.num_programs(0)):
        row = tl.cast(i, tl.int32)
        num_bytes += (WORLD - 1) * K * 4
        entry = row * K + k
        # Bounds say what is not to be read: an interpreted kernel cannot combine masks of two shapes.
        slot_K = tl.load(slots + entry, mask=k < tl.where(row < num_tokens, K, 0), other=-1)
        slot_K = slot_K.to(tl.int32)
        rank_K = tl.where(slot_K >= 0, slot_K // SLOTS_PER_RANK, -1)
        goes = tl.max(slot_K, 0) >= 0
        width = tl.where(goes, H, 0)
        weight_K = tl.load(weights + entry, mask=k < tl.where(goes, K, 0), other=0.0)
        at = tl.cast(row, tl.int64) * H
        place = tl.cast(rank * num_rows + row, tl.int64)
        if FLOAT8:
            q, scale, channel, block = quantised(x + at, width, PADDED_H)
        else:
            channel = tl.arange(0, PADDED_H)
            x_H = tl.load(x + at + channel, mask=channel < width, other=0.0)
        for next in tl.static_range(1, WORLD + 1):
            to = (rank + next) % WORLD
            is_there_K = (rank_K == to) & (k < K)
            local_K = tl.where(is_there_K, slot_K - to * SLOTS_PER_RANK, -1)
            sent = tl.max(is_there_K.to(tl.int32), 0) != 0
            to_slots = address(table, SLOTS, to, WORLD).to(tl.pointer_type(tl.int32))
            tl.store(to_slots + place * K + k, local_K, mask=k < K)
            if sent:
                if FLOAT8:
                    to_q = address(table, ROWS, to, WORLD).to(tl.pointer_type(tl.float8e4nv))
                    to_scale = address(table, SCALES, to, WORLD).to(tl.pointer_type(tl.float32))
                    tl.store(to_q + place * H + channel, q, mask=channel < H)
                    tl.store(
                        to_scale + place * (H // _BLOCK) + block, scale, mask=block < H // _BLOCK
                    )
                else:
                    to_x = address(table, ROWS, to, WORLD).to(tl.pointer_type(tl.bfloat16))
                    tl.store(to_x + place * H + channel, x_H, mask=channel < H)
                to_weights = address(table, WEIGHTS, to, WORLD).to(tl.pointer_type(tl.float32))
                tl.store(to_weights + place * K + k, weight_K, mask=k < K)
                if RANGED:
                    to_ranges = address(table, RANGES, to, WORLD).to(tl.pointer_type(tl.float32))
                    tl.store(to_ranges + place, tl.load(ranges + row))
                if next < WORLD:
                    num_bytes += ROW_BYTES
    tl.store(word_of(state, _SENT, program), num_bytes)
    if SIGNALS:
        meet_peers(
            table + DISPATCHED * WORLD, state, given, num_rows, failed, report, deadline_ns, rank,
            WORLD, WAITS,
        )  # fmt: skip


@triton.jit(do_not_specialize=["num_rows", "rank", "deadline_ns"])  # type: ignore[untyped-decorator,unused-ignore]
def wait_for_rows(  # type: ignore[no-untyped-def]
    table, state, failed, report, num_rows, rank, deadline_ns, WORLD: tl.constexpr
):  # fmt: skip
    """The wait of a dispatch alone, for when something was done meanwhile; as many programs as it had."""
    program = tl.program_id(0)
    flags, given = table + DISPATCHED * WORLD, tl.load(word_of(state, _GIVEN, program))
    wait_for_peers(flags, program, given, num_rows, failed, report, deadline_ns, rank, WORLD)


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def quantised(x, width, PADDED_H: tl.constexpr):  # type: ignore[no-untyped-def]
    """q [B, 128], scale [B], and the channels and blocks that they are of.

    Magnitudes are compared as the integers that their bits are, where a NaN is greater than Inf.
    """
    block = tl.arange(0, PADDED_H // _BLOCK)
    channel = block[:, None] * _BLOCK + tl.arange(0, _BLOCK)[None, :]
    x_BC = tl.load(x + channel, mask=channel < width, other=0.0)
    bits_BC = x_BC.to(tl.int16, bitcast=True).to(tl.int32) & 0x7FFF
    amax_B = tl.max(bits_BC, 1)
    refused_B = amax_B >= 0x7F80
    scale_B = tl.div_rn(tl.maximum((amax_B << 16).to(tl.float32, bitcast=True), 1e-4), 448.0)
    scale_B = tl.where(refused_B, 1.0, scale_B)
    y_BC = tl.where(refused_B[:, None], 0.0, x_BC.to(tl.float32))
    # Markstein's division: with 1 / scale rounded to nearest, one step from the product with it gives
    # what IEEE's division does. (Where a remainder could underflow, e4m3 has nothing but zero.)
    inverse_BC = tl.broadcast_to(tl.div_rn(1.0, scale_B)[:, None], y_BC.shape)
    near_BC = y_BC * inverse_BC
    rest_BC = tl.fma(-near_BC, tl.broadcast_to(scale_B[:, None], y_BC.shape), y_BC)
    exact_BC = tl.fma(rest_BC, inverse_BC, near_BC)
    exact_BC = tl.where(y_BC == 0, y_BC, exact_BC)  # the sign of a zero
    q_BC = tl.minimum(tl.maximum(exact_BC, -448.0), 448.0).to(tl.float8e4nv)
    return q_BC, tl.where(refused_B, float("inf"), scale_B), channel, block
