# ruff: noqa: ANN001, ANN201, ANN202  (what Triton compiles has no Python types)
"""e4m3 with a scale for each 128 channels, of which a program may have half.

Its neighbour then has the other half: programs 2 i and 2 i + 1 do the two halves of a block for the same
rows in the same turn, and tell each other their rows' greatest magnitudes through memory.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from experts.kernels.hopper import HALF


@gluon.jit  # type: ignore[untyped-decorator,unused-ignore]
def quantize_tile(  # type: ignore[no-untyped-def]
    hidden, told, spoken, PART: gl.constexpr, FEATURES: gl.constexpr
):
    """(e4m3 [64, FEATURES], fp32 scale of each row) of a group's rows, in its tile number `spoken` of those with rows."""
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, FEATURES, 32])
    of_rows: gl.constexpr = gl.SliceLayout(
        1, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 32])
    )
    amax = gl.convert_layout(gl.max(gl.abs(hidden), 1), of_rows)
    if FEATURES < 128:
        amax = gl.maximum(amax, _other_half(told, amax, spoken, of_rows, PART))
    scale = gl.div_rn(gl.maximum(amax, 1e-4), 448.0)
    return _quotient(hidden, gl.convert_layout(scale, gl.SliceLayout(1, mma))).to(
        gl.float8e4nv
    ), scale


@gluon.jit  # type: ignore[untyped-decorator,unused-ignore]
def _quotient(x, divisor):  # type: ignore[no-untyped-def]
    """x / divisor of its row as IEEE rounds it, without a branch for each element as div_rn has.

    From a reciprocal that is rounded so itself, two steps of x - divisor * q (P. Markstein, "Computation
    of elementary functions on the IBM RISC System/6000 processor", theorem 8.2). Not for divisors near
    the ends of the range: here they are 2e-7 and more.
    """
    reciprocal = gl.expand_dims(gl.div_rn(gl.full_like(divisor, 1.0), divisor), 1)
    minus = gl.expand_dims(-divisor, 1)
    q = x * reciprocal
    for _ in gl.static_range(2):
        q = gl.fma(gl.fma(minus, q, x), reciprocal, q)
    return q


_TELL: gl.constexpr = gl.constexpr("st.relaxed.gpu.global.u32 [$1], $2; mov.u32 $0, 0;")

_HEAR: gl.constexpr = gl.constexpr("""
{
    .reg .pred %old;
    .reg .u32 %other;
again:
    ld.relaxed.gpu.global.u32 $0, [$1];
    xor.b32 %other, $0, $2;
    setp.ge.u32 %old, %other, 0x80000000;
    @%old bra again;
}
""")


@gluon.jit  # type: ignore[untyped-decorator,unused-ignore]
def _other_half(told, amax, spoken, of_rows: gl.constexpr, PART: gl.constexpr):  # type: ignore[no-untyped-def]
    """The greatest magnitudes of the neighbour's channels, which gets mine.

    Magnitudes have no sign: their sign bit says that a word is new, by being another one than the time
    before. A program has two words for each row, in turns: before one is written again its reader has
    spoken in between, so it has heard. Programs start in order and both halves of a pair are next to each
    other, so nobody waits for one that cannot start.
    """
    sign = (1 - (spoken >> 1 & 1)) << 31
    word = amax.to(gl.int32, bitcast=True) | sign
    theirs = _words_of(told, gl.program_id(0) ^ 1, spoken, of_rows, PART)
    gl.inline_asm_elementwise(
        _TELL, "=r,l,r", [theirs, word], dtype=gl.int32, is_pure=False, pack=1
    )
    mine = _words_of(told, gl.program_id(0), spoken, of_rows, PART)
    heard = gl.inline_asm_elementwise(
        _HEAR, "=&r,l,r", [mine, gl.full_like(word, 0) | sign],
        dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip
    return (heard & 0x7FFFFFFF).to(gl.float32, bitcast=True)


@gluon.jit  # type: ignore[untyped-decorator,unused-ignore]
def _words_of(told, program, spoken, layout: gl.constexpr, PART: gl.constexpr):  # type: ignore[no-untyped-def]
    at = (spoken & 1) * gl.num_programs(0) + program
    return told + (at * (2 * HALF) + PART * HALF + gl.arange(0, HALF, layout))


@gluon.jit  # type: ignore[untyped-decorator,unused-ignore]
def forget(told, PART: gl.constexpr):  # type: ignore[no-untyped-def]
    """Zeros behind the last thing heard."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    nothing = gl.zeros([HALF], gl.int32, layout)
    for turn in gl.static_range(2):
        gl.store(_words_of(told, gl.program_id(0), turn, layout, PART), nothing)
