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
    hidden, told, turn, PART: gl.constexpr, ROWS: gl.constexpr, FEATURES: gl.constexpr
):
    """(e4m3 [64, FEATURES], fp32 scale of each row) of a group's rows, in its `turn`th tile that has any."""
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, FEATURES, 32])
    of_rows: gl.constexpr = gl.SliceLayout(
        1, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 32])
    )
    amax = gl.convert_layout(gl.max(gl.abs(hidden), 1), of_rows)
    if FEATURES < 128:
        amax = gl.maximum(amax, _other_half(told, amax, turn, of_rows, PART, ROWS))
    scale = gl.div_rn(gl.maximum(amax, 1e-4), 448.0)
    divisor = gl.expand_dims(gl.convert_layout(scale, gl.SliceLayout(1, mma)), 1)
    return gl.div_rn(hidden, divisor).to(gl.float8e4nv), scale


@gluon.jit  # type: ignore[untyped-decorator,unused-ignore]
def _other_half(  # type: ignore[no-untyped-def]
    told, amax, turn, of_rows: gl.constexpr, PART: gl.constexpr, ROWS: gl.constexpr
):
    """The greatest magnitudes of the neighbour's channels, which gets mine.

    A place in `told` holds a value's bits + 1, and 0 when nothing was said or it has been heard. A
    program has two of them for each row, for even and odd turns: before one is written again its
    reader has spoken in the turn between, so it has heard. Programs start in order and both halves of
    a pair are next to each other, so nobody waits for one that cannot start.
    """
    program = gl.program_id(0)
    at = (turn & 1) * gl.num_programs(0)
    row = PART * HALF + gl.arange(0, HALF, of_rows)
    theirs = told + ((at + (program ^ 1)) * ROWS + row)
    mine = told + ((at + program) * ROWS + row)
    nothing = gl.zeros([HALF], gl.int32, of_rows)
    gl.atomic_xchg(theirs, amax.to(gl.int32, bitcast=True) + 1, sem="relaxed")
    heard = gl.atomic_xchg(mine, nothing, sem="relaxed")
    while gl.min((heard != 0).to(gl.int32), 0) == 0:
        more = gl.atomic_xchg(mine, nothing, mask=heard == 0, sem="relaxed")
        heard = gl.where(heard == 0, more, heard)
    return (heard - 1).to(gl.float32, bitcast=True)
