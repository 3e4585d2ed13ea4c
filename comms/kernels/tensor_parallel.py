# ruff: noqa: ANN001, ANN201, ANN202  (what Triton compiles has no Python types)
"""Rows of a replica between its GPUs: gathered before heads and channels are computed, summed after.

Legend: T rows of the replica, W ranks of it, O = ceil(T / W) own rows of each, H hidden, V vocabulary.

Row t is rank t // O's own, and has its place t in everybody's memory. A program takes own row i of all
ranks: what it stores for its twins is what they wait for (`comms/kernels/signals.py`). Around the exchange
a row is whole in a program, so the norm that comes before or after is made there too. EARLY: launched with
programmatic dependent launch.

The ranks' parts are added in rank order in fp32 and rounded once, as `comms/sizes.sum_in_order` does; sums
with the residual stream are rounded as the CPU's layers round them, and norms are fp32 inside. All of it is of one
row alone.

Kernels of the two kinds take turns on all ranks, so each finds the other kind's memory free: a rank that
stores into mine has waited for a kernel of mine that came after my last look there.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from comms.kernels.regions import address
from comms.kernels.signals import GIVEN, meet_peers, word_of

# Rows of the table of addresses [region, rank], see `comms/symmetric_rows.py`.
_ROWS, _PARTS, _LOGITS, _FLAGS = (tl.constexpr(region) for region in range(4))
_GIVEN = tl.constexpr(GIVEN)


@triton.jit(do_not_specialize=["num_own", "rank", "deadline_ns"])  # type: ignore[untyped-decorator,unused-ignore]
def gather_rows(  # type: ignore[no-untyped-def]
    x, added, gain, sums, table, state, failed, report, num_own, rank, deadline_ns, eps,
    WORLD: tl.constexpr, H: tl.constexpr, BLOCK: tl.constexpr, ADDS: tl.constexpr,
    NORMS: tl.constexpr, SIGNALS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """My rows x bf16 [O, H], plus `added`, the norm of the sum, to all ranks; the sum itself to `sums`."""
    _begin(EARLY)
    h = tl.arange(0, BLOCK)
    for i in range(tl.program_id(0), num_own, tl.num_programs(0)):
        at = tl.cast(i, tl.int64) * H + h
        x_H = tl.load(x + at, mask=h < H, other=0.0)
        if ADDS:
            x_H = _sum(x_H, tl.load(added + at, mask=h < H, other=0.0))
            tl.store(sums + at, x_H, mask=h < H)
        if NORMS:
            x_H = _normed(x_H, tl.load(gain + h, mask=h < H, other=0.0), eps, H)
        place = rank * num_own + i
        for next in tl.static_range(1, WORLD + 1):  # with padding: there is room for it
            rows = address(table, _ROWS, (rank + next) % WORLD, WORLD).to(
                tl.pointer_type(tl.bfloat16)
            )
            tl.store(rows + tl.cast(place, tl.int64) * H + h, x_H, mask=h < H)
    if SIGNALS:
        _meet(table, state, failed, report, num_own, rank, deadline_ns, WORLD)


@triton.jit(do_not_specialize=["num_rows", "num_own", "rank", "deadline_ns"])  # type: ignore[untyped-decorator,unused-ignore]
def scatter_sums(  # type: ignore[no-untyped-def]
    parts, residual, gain, out, sums, table, state, failed, report, num_rows, num_own, rank,
    deadline_ns, eps, WORLD: tl.constexpr, H: tl.constexpr, BLOCK: tl.constexpr,
    ADDS: tl.constexpr, NORMS: tl.constexpr, SENDS: tl.constexpr, RECEIVES: tl.constexpr,
    SIGNALS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """parts bf16 [T, H]: mine of every row. My rows' sums over the ranks, plus `residual`, to `sums` bf16 [O, H];
    the norm of that to `out`. Own rows beyond T are zero. SENDS, RECEIVES: both, or one alone."""
    _begin(EARLY)
    h = tl.arange(0, BLOCK)
    if SENDS:
        for i in range(tl.program_id(0), num_own, tl.num_programs(0)):
            for next in tl.static_range(1, WORLD):
                to = (rank + next) % WORLD
                row, place = (
                    tl.cast(to * num_own + i, tl.int64),
                    tl.cast(rank * num_own + i, tl.int64),
                )
                width = tl.where(row < num_rows, H, 0)
                part_H = tl.load(parts + row * H + h, mask=h < width, other=0.0)
                theirs = address(table, _PARTS, to, WORLD).to(tl.pointer_type(tl.bfloat16))
                tl.store(theirs + place * H + h, part_H, mask=h < width)
    if SIGNALS:
        _meet(table, state, failed, report, num_own, rank, deadline_ns, WORLD)
    if RECEIVES:
        arrived = address(table, _PARTS, rank, WORLD).to(tl.pointer_type(tl.bfloat16))
        for i in range(tl.program_id(0), num_own, tl.num_programs(0)):
            row, at = tl.cast(rank * num_own + i, tl.int64), tl.cast(i, tl.int64) * H + h
            width = tl.where(row < num_rows, H, 0)
            mine_H = tl.load(parts + row * H + h, mask=h < width, other=0.0)
            sum_H = tl.zeros([BLOCK], tl.float32)
            for r in tl.static_range(WORLD):
                place = tl.cast(r * num_own + i, tl.int64)
                there = tl.where(r == rank, 0, width)
                part_H = tl.load(arrived + place * H + h, mask=h < there, other=0.0)
                part_H = tl.where(r == rank, mine_H, part_H).to(tl.float32)
                sum_H = part_H if r == 0 else sum_H + part_H
            x_H = sum_H.to(tl.bfloat16)
            if ADDS:
                x_H = _sum(x_H, tl.load(residual + at, mask=h < H, other=0.0))
            tl.store(sums + at, x_H, mask=h < H)
            if NORMS:
                y_H = _normed(x_H, tl.load(gain + h, mask=h < H, other=0.0), eps, H)
                tl.store(out + at, y_H, mask=h < H)


@triton.jit(do_not_specialize=["num_rows", "rank", "deadline_ns"])  # type: ignore[untyped-decorator,unused-ignore]
def gather_columns(  # type: ignore[no-untyped-def]
    y, table, state, failed, report, num_rows, width, first, offset, rank, deadline_ns,
    WORLD: tl.constexpr, V: tl.constexpr, BLOCKS: tl.constexpr, BLOCK: tl.constexpr,
    SIGNALS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """y bf16 [rows, width]: columns from `first` on of what all ranks get whole, in rows of V, `offset`
    values into the region. BLOCKS: of a row, as many on every rank."""
    _begin(EARLY)
    for unit in range(tl.program_id(0), num_rows * BLOCKS, tl.num_programs(0)):
        row = tl.cast(unit // BLOCKS, tl.int64)
        v = unit % BLOCKS * BLOCK + tl.arange(0, BLOCK)
        y_V = tl.load(y + row * width + v, mask=v < width, other=0.0)
        for next in tl.static_range(1, WORLD + 1):
            to = address(table, _LOGITS, (rank + next) % WORLD, WORLD).to(
                tl.pointer_type(tl.bfloat16)
            )
            tl.store(to + offset + row * V + first + v, y_V, mask=v < width)
    if SIGNALS:
        _meet(table, state, failed, report, num_rows, rank, deadline_ns, WORLD)


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _begin(EARLY: tl.constexpr):  # type: ignore[no-untyped-def]
    """A launch before the kernel ahead has ended waits for it here, and lets the next one come likewise."""
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _meet(table, state, failed, report, num_rows, rank, deadline_ns, WORLD: tl.constexpr):  # type: ignore[no-untyped-def]
    """What my twins have stored for me is there; mine for them is on its way."""
    flags, given = table + _FLAGS * WORLD, tl.load(word_of(state, _GIVEN, tl.program_id(0)))
    meet_peers(flags, state, given, num_rows, failed, report, deadline_ns, rank, WORLD, True)


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _sum(a_H, b_H):  # type: ignore[no-untyped-def]
    return (a_H.to(tl.float32) + b_H.to(tl.float32)).to(tl.bfloat16)


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _normed(x_H, gain_H, eps, H: tl.constexpr):  # type: ignore[no-untyped-def]
    """As `cluster/model/norm.py`; channels beyond H are zeros."""
    values = x_H.to(tl.float32)
    inverse = tl.rsqrt(tl.sum(values * values, 0) / H + eps)
    return (values * inverse * gain_H.to(tl.float32)).to(tl.bfloat16)
