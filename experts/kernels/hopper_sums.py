# ruff: noqa: ANN001, ANN201, ANN202  (what Triton compiles has no Python types)
"""How a group of warps multiplies: 64 rows with two blocks of weights, stage after stage of the ring.

FP8: what the tensor cores sum over 128 channels is added to fp32 with the scales (gate_up.py). While a
group does that the tensor cores should work for the other one. Left alone both issue their products at
the same time, get them at the same time, and then both add while the tensor cores stand still; so they
take turns to issue.

Two blocks are one product, which is cut in two at the end; but for FP8's of 128 features, whose sums and
what is added to them would not fit a thread's registers.

Legend: C channels, which are contracted.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from experts.kernels.hopper import HALF, assembly


@gluon.jit  # type: ignore[untyped-decorator,unused-ignore]
def sums_of_tile(  # type: ignore[no-untyped-def]
    ring, step, first_at, second_at, PART: gl.constexpr, C: gl.constexpr, X8: gl.constexpr,
    ROWS: gl.constexpr, FEATURES: gl.constexpr, STAGES: gl.constexpr, GATHERED: gl.constexpr,
    TURNS: gl.constexpr,
):  # fmt: skip
    """(sums of the first weights, of the second, next step) of a group's rows.

    FP8: the weights' scales lie at the pointers. Tiles of 64 rows go to the groups in turns, and so do the
    products of a tile: the next one's begin when this one's are made.
    """
    part: gl.constexpr = PART if ROWS == 2 * HALF else 0  # of the tile's rows
    if ROWS == HALF:
        take_turn(PART)
    if X8:
        first, second, step = sums_of_float8(
            ring, step, first_at, second_at, part, C, FEATURES, STAGES, GATHERED, TURNS
        )
    else:
        first, second, step = sums_of_bfloat16(ring, step, part, C, FEATURES, STAGES, GATHERED)
    if ROWS == HALF:
        pass_turn(PART)
    return first, second, step


@gluon.jit  # type: ignore[untyped-decorator,unused-ignore]
def sums_of_float8(  # type: ignore[no-untyped-def]
    ring, step, first_at, second_at, PART: gl.constexpr, C: gl.constexpr, FEATURES: gl.constexpr,
    STAGES: gl.constexpr, GATHERED: gl.constexpr, TURNS: gl.constexpr,
):  # fmt: skip
    """(sums of the first weights, of the second, next step) of a tile; weights' scales lie at the pointers.

    Those of the next step are read one step early: they would be waited for otherwise.
    """
    rows, scales, weights, full, empty = ring
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 32])
    nothing = gl.zeros([HALF, 128], gl.float32, layout)
    first = gl.zeros([HALF, 128], gl.float32, layout)
    second = gl.zeros([HALF, 128], gl.float32, layout)
    is_first = gl.arange(0, 128, gl.SliceLayout(0, layout)) < FEATURES
    first_scale = gl.load(first_at)
    second_scale = gl.load(second_at)
    for k in range(C // 128):
        stage = step % STAGES
        mbarrier.wait(full.index(stage), (step // STAGES) & 1)
        if GATHERED:
            fence_async_shared()  # the tensor cores read what threads have copied
        mine = rows.index(stage).slice(PART * HALF, HALF, 0)
        both = weights.index(stage)
        sums = _start(mine, both.slice(0, 128, 0), nothing, PART, TURNS)
        # After the fence, which would wait for them, and while the tensor cores work.
        ahead = gl.minimum(k + 1, C // 128 - 1)
        next_first_scale = gl.load(first_at + ahead)
        next_second_scale = gl.load(second_at + ahead)
        row_scale = scales.index(stage).slice(PART * HALF, HALF, 0).load(gl.SliceLayout(1, layout))
        sums = warpgroup_mma_wait(0, deps=(sums,))
        if FEATURES == 128:
            first += sums * gl.expand_dims(row_scale * first_scale, 1)
            sums = _start(mine, both.slice(128, 128, 0), nothing, PART, TURNS)
            sums = warpgroup_mma_wait(0, deps=(sums,))
            mbarrier.arrive(empty.index(stage), count=1)
            second += sums * gl.expand_dims(row_scale * second_scale, 1)
        else:
            mbarrier.arrive(empty.index(stage), count=1)
            scale = gl.expand_dims(gl.where(is_first, first_scale, second_scale), 0)
            first += sums * (gl.expand_dims(row_scale, 1) * scale)
        first_scale = next_first_scale
        second_scale = next_second_scale
        step += 1
    if FEATURES == 128:
        return first, second, step
    else:  # noqa: RET505  (Triton wants one of two returns to be chosen)
        left, right = _cut(first, 32)
        return left, right, step


@gluon.jit  # type: ignore[untyped-decorator,unused-ignore]
def _start(rows, weights, nothing, PART: gl.constexpr, TURNS: gl.constexpr):  # type: ignore[no-untyped-def]
    """The sums, which are on their way."""
    if TURNS:
        take_turn(PART)
    sums = warpgroup_mma(rows, weights.permute((1, 0)), nothing, use_acc=False, is_async=True)
    if TURNS:
        pass_turn(PART)
    return sums


@gluon.jit  # type: ignore[untyped-decorator,unused-ignore]
def take_turn(PART: gl.constexpr):  # type: ignore[no-untyped-def]
    """Until the other group has passed it: 128 of the barrier's 256 threads wait, 128 arrive."""
    if PART == 0:
        assembly("bar.sync 14, 256; // $0")
    else:
        assembly("bar.sync 15, 256; // $0")


@gluon.jit  # type: ignore[untyped-decorator,unused-ignore]
def pass_turn(PART: gl.constexpr):  # type: ignore[no-untyped-def]
    if PART == 0:
        assembly("bar.arrive 15, 256; // $0")
    else:
        assembly("bar.arrive 14, 256; // $0")


@gluon.jit  # type: ignore[untyped-decorator,unused-ignore]
def pass_over(  # type: ignore[no-untyped-def]
    ring, step, steps: gl.constexpr, PART: gl.constexpr, FEATURES: gl.constexpr,
    STAGES: gl.constexpr, TURNS: gl.constexpr,
):  # fmt: skip
    """The next step after a tile that has no rows for this group."""
    _rows, _scales, _weights, full, empty = ring
    for _k in range(steps):
        stage = step % STAGES
        mbarrier.wait(full.index(stage), (step // STAGES) & 1)
        if TURNS:
            for _both in gl.static_range(FEATURES // 64):
                take_turn(PART)
                pass_turn(PART)
        mbarrier.arrive(empty.index(stage), count=1)
        step += 1
    return step


@gluon.jit  # type: ignore[untyped-decorator,unused-ignore]
def _cut(both, depth: gl.constexpr):  # type: ignore[no-untyped-def]
    """[64, 2 N] as two of [64, N]; no value leaves its thread."""
    width: gl.constexpr = both.shape[1] // 2
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, width, depth])
    left, right = both.reshape([HALF, 2, width]).permute((0, 2, 1)).split()
    return gl.convert_layout(left, layout), gl.convert_layout(right, layout)


@gluon.jit  # type: ignore[untyped-decorator,unused-ignore]
def sums_of_bfloat16(  # type: ignore[no-untyped-def]
    ring, step, PART: gl.constexpr, C: gl.constexpr, FEATURES: gl.constexpr, STAGES: gl.constexpr,
    GATHERED: gl.constexpr,
):  # fmt: skip
    """(sums of the first weights, of the second, next step) of a tile."""
    rows, _scales, weights, full, empty = ring
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 2 * FEATURES, 16])
    sums = gl.zeros([HALF, 2 * FEATURES], gl.float32, layout)
    for _k in range(C // 64):
        stage = step % STAGES
        mbarrier.wait(full.index(stage), (step // STAGES) & 1)
        if GATHERED:
            fence_async_shared()  # the tensor cores read what threads have copied
        mine = rows.index(stage).slice(PART * HALF, HALF, 0)
        sums = warpgroup_mma(mine, weights.index(stage).permute((1, 0)), sums, is_async=True)
        sums = warpgroup_mma_wait(0, deps=(sums,))
        mbarrier.arrive(empty.index(stage), count=1)
        step += 1
    left, right = _cut(sums, 16)
    return left, right, step
