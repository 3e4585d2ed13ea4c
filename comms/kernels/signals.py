# ruff: noqa: ANN001, ANN201  (what Triton compiles has no Python types)
"""How kernels on different GPUs tell each other that bytes have arrived, without the host.

The same program of the same kernel runs on every rank, and each speaks only to its twins: what program
p of one rank stores, program p of the other waits for. So nobody has to know when a whole kernel is
done. Each rank owns a flag per program on every peer:

    flag = signals so far * 2^24 + rows per source

A signal is a barrier of the program's threads, a fence at system scope and a store, so whoever reads
the flag with an acquire sees all rows that were stored before it (PTX ISA, memory consistency model).
Twins wait for nothing but twins: however few programs run at a time, the lowest unfinished one can go on.

Every program keeps numbers of its own from one launch to the next, in `state`, int64 [words, PROGRAMS]:
signals given and awaited, and the bytes that it has stored into other ranks' memory. It reads them when it
begins: once its rows are on their way they would be waited for.

Waiting has a deadline, by the GPU's own clock. A late peer, or one whose number of rows is another, is
written into `report`, which the host reads when it next looks; then nothing waits any more, so that the
queue of a failed step drains at once.
"""

import triton
import triton.language as tl

from comms.symmetric_layout import PROGRAMS

ROWS_BITS = 24
ON_TIME, LATE, DISAGREES = 0, 1, 2  # the first number of a report
REPORT_WORDS = 4  # by peer: what, the signals that were awaited, the flag that was there, 0
GIVEN, AWAITED, SENT = range(3)  # words of a state
STATE_WORDS = 3

_MAX_PROGRAMS = tl.constexpr(PROGRAMS)
_ROWS_BITS = tl.constexpr(ROWS_BITS)
_LATE, _DISAGREES = tl.constexpr(LATE), tl.constexpr(DISAGREES)
_REPORT_WORDS = tl.constexpr(REPORT_WORDS)
_GIVEN = tl.constexpr(GIVEN)

# One thread does it, after a barrier of all: its fence covers what the others stored (cumulativity).
_POST = tl.constexpr("""
{
    .reg .pred %first;
    .reg .u32 %thread;
    mov.u64 $0, 0;
    mov.u32 %thread, %tid.x;
    setp.eq.u32 %first, %thread, 0;
    @%first fence.acq_rel.sys;
    @%first st.relaxed.sys.global.u64 [$1], $2;
}
""")

# One thread polls; the barrier after it orders the others. The result is what the flag held at last.
# After a millisecond it also looks whether another program has given up.
_POLL = tl.constexpr("""
{
    .reg .pred %other, %here, %over;
    .reg .u32 %thread;
    .reg .u64 %start, %now, %count, %stop;
    mov.u64 $0, 0;
    mov.u32 %thread, %tid.x;
    setp.ne.u32 %other, %thread, 0;
    @%other bra done;
    mov.u64 %start, %globaltimer;
poll:
    ld.acquire.sys.global.u64 $0, [$1];
    shr.u64 %count, $0, 24;
    setp.ge.u64 %here, %count, $2;
    @%here bra done;
    mov.u64 %now, %globaltimer;
    sub.u64 %now, %now, %start;
    setp.gt.u64 %over, %now, $3;
    @%over bra done;
    setp.lt.u64 %here, %now, 1000000;
    @%here bra poll;
    ld.relaxed.gpu.global.u64 %stop, [$4];
    setp.eq.u64 %here, %stop, 0;
    @%here bra poll;
done:
}
""")


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def word_of(state, WORD: tl.constexpr, program):  # type: ignore[no-untyped-def]
    """Where a program keeps it."""
    return state + WORD * _MAX_PROGRAMS + program


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def meet_peers(  # type: ignore[no-untyped-def]
    flags, state, given, rows, failed, report, deadline_ns, rank, WORLD: tl.constexpr,
    WAITS: tl.constexpr,
):  # fmt: skip
    """What this program has stored is there; WAITS: and so is what its twins have stored here. given: signals
    before this one."""
    program, count = tl.program_id(0), given + 1
    tl.store(word_of(state, _GIVEN, program), count)
    signal_peers(flags, program, count, rows, rank, WORLD)
    if WAITS:
        wait_for_peers(flags, program, count, rows, failed, report, deadline_ns, rank, WORLD)


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def signal_peers(flags, program, count, rows, rank, WORLD: tl.constexpr):  # type: ignore[no-untyped-def]
    """All that this program has stored so far is there; this is its signal number `count`.

    flags: int64 [WORLD], addresses of the flags of this kind of transfer on every rank.
    """
    tl.debug_barrier()
    for i in tl.static_range(1, WORLD):
        theirs = tl.load(flags + (rank + i) % WORLD).to(tl.pointer_type(tl.int64))
        theirs += rank * _MAX_PROGRAMS + program
        value = (tl.cast(count, tl.int64) << _ROWS_BITS) + rows
        tl.inline_asm_elementwise(
            _POST, "=&l,l,l", [theirs, value], dtype=tl.int64, is_pure=False, pack=1
        )


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def wait_for_peers(  # type: ignore[no-untyped-def]
    flags, program, count, rows, failed, report, deadline_ns, rank, WORLD: tl.constexpr
):  # fmt: skip
    """Return when the twins have given signal number `count`, or a deadline is over."""
    mine = tl.load(flags + rank).to(tl.pointer_type(tl.int64)) + program
    wanted = tl.cast(count, tl.int64)
    patience = tl.where(tl.load(failed, volatile=True) == 0, deadline_ns, 0).to(tl.int64)
    for i in tl.static_range(1, WORLD):
        peer = (rank + i) % WORLD
        flag = tl.inline_asm_elementwise(
            _POLL, "=&l,l,l,l,l", [mine + peer * _MAX_PROGRAMS, wanted, patience, failed],
            dtype=tl.int64, is_pure=False, pack=1,
        )  # fmt: skip
        # From here on only the thread that polled knows anything; it is the one that stores scalars.
        arrived = flag >> _ROWS_BITS
        disagrees = (arrived == wanted) & ((flag & ((1 << _ROWS_BITS) - 1)) != rows)
        what = tl.where(arrived < wanted, _LATE, tl.where(disagrees, _DISAGREES, 0)).to(tl.int64)
        patience = tl.where(what == 0, patience, 0)
        # What follows the first failure is its consequence.
        is_first = (what != 0) & (tl.load(failed, volatile=True) == 0)
        line = report + peer * _REPORT_WORDS
        tl.store(line + 1, wanted, mask=is_first)
        tl.store(line + 2, flag, mask=is_first)
        tl.store(line, what, mask=is_first)
        tl.store(failed, 1, mask=what != 0)
    tl.debug_barrier()
