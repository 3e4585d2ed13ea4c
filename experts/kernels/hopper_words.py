# ruff: noqa: ANN001, ANN201  (what Triton compiles has no Python types)
"""How programs of one launch tell each other that a tile's activations are all there.

`words` (experts/kernels/counters.py), zeros before and after a launch: the greatest magnitudes that
neighbours tell each other (hopper_quantize.py), how many programs wait for nothing any more, and how many
parts of each tile of rows are done.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from experts.kernels.hopper import barrier

TOLD: gl.constexpr = gl.constexpr(2 * 128)
"""Words of a program for its neighbour's greatest magnitudes."""

# One thread of a group counts, after a barrier of all: its release covers what the others stored.
_COUNT: gl.constexpr = gl.constexpr("""
{
    .reg .pred %first;
    .reg .u32 %thread;
    mov.u32 $0, 0;
    mov.u32 %thread, %tid.x;
    and.b32 %thread, %thread, 127;
    setp.eq.u32 %first, %thread, 0;
    @%first red.release.gpu.global.add.u32 [$1], 1;
}
""")

_WAIT: gl.constexpr = gl.constexpr("""
{
    .reg .pred %less;
again:
    ld.acquire.gpu.global.u32 $0, [$1];
    setp.lt.u32 %less, $0, $2;
    @%less bra again;
    fence.proxy.async;
}
""")


@gluon.jit  # type: ignore[untyped-decorator,unused-ignore]
def count_done(words, tile):  # type: ignore[no-untyped-def]
    """A group's part of the tile is stored; the copy engine of another program may read it."""
    done = words + gl.num_programs(0) * TOLD + 1 + tile
    barrier()
    gl.inline_asm_elementwise(_COUNT, "=r,l", [done], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit  # type: ignore[untyped-decorator,unused-ignore]
def wait_for_tile(words, tile, parts: gl.constexpr):  # type: ignore[no-untyped-def]
    """Until all its parts are stored."""
    done = words + gl.num_programs(0) * TOLD + 1 + tile
    gl.inline_asm_elementwise(
        _WAIT, "=&r,l,r", [done, gl.to_tensor(parts)], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit  # type: ignore[untyped-decorator,unused-ignore]
def leave(words, num_tiles):  # type: ignore[no-untyped-def]
    """This program waits for no tile any more: the last to say so leaves zeros behind."""
    left = words + gl.num_programs(0) * TOLD
    barrier()
    if gl.atomic_add(left, 1, sem="acq_rel") == gl.num_programs(0) - 1:
        layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
        for first in range(0, num_tiles + 1, 128):
            at = first + gl.arange(0, 128, layout)
            gl.store(left + at, gl.zeros([128], gl.int32, layout), mask=at <= num_tiles)
