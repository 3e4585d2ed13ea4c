# ruff: noqa: ANN001, ANN201, ANN202  (what Triton compiles has no Python types)
"""Dense products of up to 16 tokens on a Hopper GPU: the weights are on their way before the tokens are there.

A program has 64 outputs. Its first STAGES tiles of weights are asked for into shared memory at once, as
nobody writes weights; then it waits for the kernel before it (experts/kernels/early.py), asks for the tokens,
and multiplies what has arrived while the rest of the weights comes. The order of sums is that of
`experts.kernels.linear_kernels`: channels in order; with scales 128 of them, then fp32, in parts.

Legend: T tokens, O output and I input channels, N independent products.
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

from experts.kernels.early import let_next_start, wait_for_inputs
from experts.kernels.hopper import copy_tile


@gluon.jit  # type: ignore[untyped-decorator,unused-ignore]
def hopper_linear_few(  # type: ignore[no-untyped-def]
    x, w, out, x_scale, w_scale, num_tokens, outputs, x_number, out_token, out_number,
    STEPS: gl.constexpr, STEPS_OF_PART: gl.constexpr, DEPTH: gl.constexpr, STAGES: gl.constexpr,
    SCALED: gl.constexpr, TURN: gl.constexpr, EARLY: gl.constexpr,
):  # fmt: skip
    """x [T, ...] and w [N * O, I] are descriptors; product n reads x from column n * x_number on."""
    dtype: gl.constexpr = gl.float8e4nv if SCALED else gl.bfloat16
    shared: gl.constexpr = gl.NVMMASharedLayout(128, 8 if SCALED else 16, 2)
    ws = gl.allocate_shared_memory(dtype, [STAGES, 64, DEPTH], shared)
    xs = gl.allocate_shared_memory(dtype, [STAGES, 16, DEPTH], shared)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
    fence_async_shared()
    number, first = gl.program_id(1), gl.program_id(0) * 64
    w_row, x_column = number * outputs + first, number * x_number
    stage_bytes: gl.constexpr = (64 + 16) * DEPTH * ws.dtype.primitive_bitwidth // 8
    for i in gl.static_range(STAGES):
        mbarrier.expect(full.index(i), stage_bytes)
        copy_tile(w, [w_row, i * DEPTH], full.index(i), ws.index(i))
    wait_for_inputs(EARLY)
    let_next_start(EARLY)
    for i in gl.static_range(STAGES):
        copy_tile(x, [0, x_column + i * DEPTH], full.index(i), xs.index(i))
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 16, 32 if SCALED else 16])
    acc = gl.zeros([64, 16], gl.float32, mma)
    t = gl.arange(0, 16, gl.SliceLayout(0, mma))
    if SCALED:
        # Blocks of 128 channels know nothing of each other: the tensor cores have TURN of them at once.
        total = gl.zeros([64, 16], gl.float32, mma)
        rest = (ws, xs, full, t < num_tokens, w_scale + first // 128 * STEPS, x_scale + t * STEPS)
        for k in range(0, STEPS, TURN):
            sums_0, factor_0 = _block(rest, k, mma, STAGES)
            if TURN == 1:
                sums_0 = warpgroup_mma_wait(0, deps=(sums_0,))
            elif TURN == 2:
                sums_1, factor_1 = _block(rest, k + 1, mma, STAGES)
                sums_0, sums_1 = warpgroup_mma_wait(0, deps=(sums_0, sums_1))
            else:
                sums_1, factor_1 = _block(rest, k + 1, mma, STAGES)
                sums_2, factor_2 = _block(rest, k + 2, mma, STAGES)
                sums_3, factor_3 = _block(rest, k + 3, mma, STAGES)
                sums_0, sums_1, sums_2, sums_3 = warpgroup_mma_wait(
                    0, deps=(sums_0, sums_1, sums_2, sums_3)
                )
            for i in gl.static_range(TURN):
                _refill(
                    x, w, ws, xs, full, k + i, w_row, x_column, stage_bytes, STEPS, DEPTH, STAGES
                )
            acc, total = _add(acc, total, sums_0, factor_0, k + 1, STEPS_OF_PART)
            if TURN > 1:
                acc, total = _add(acc, total, sums_1, factor_1, k + 2, STEPS_OF_PART)
            if TURN > 2:
                acc, total = _add(acc, total, sums_2, factor_2, k + 3, STEPS_OF_PART)
                acc, total = _add(acc, total, sums_3, factor_3, k + 4, STEPS_OF_PART)
        acc = total + acc if STEPS % STEPS_OF_PART else total
    else:
        for k in range(STEPS):
            stage = k % STAGES
            mbarrier.wait(full.index(stage), (k // STAGES) & 1)
            acc = warpgroup_mma(
                ws.index(stage), xs.index(stage).permute((1, 0)), acc, is_async=True
            )
            acc = warpgroup_mma_wait(1, deps=(acc,))
            if k > 0:
                _refill(
                    x, w, ws, xs, full, k - 1, w_row, x_column, stage_bytes, STEPS, DEPTH, STAGES
                )
        acc = warpgroup_mma_wait(0, deps=(acc,))
    o = first + gl.arange(0, 64, gl.SliceLayout(1, mma))
    at = gl.expand_dims(t.to(gl.int64) * out_token + number * out_number, 0) + gl.expand_dims(o, 1)
    here = gl.expand_dims(t < num_tokens, 0) & gl.expand_dims(o < outputs, 1)
    gl.store(out + at, acc.to(out.dtype.element_ty), mask=here)


@gluon.jit  # type: ignore[untyped-decorator,unused-ignore]
def _block(rest, k, mma: gl.constexpr, STAGES: gl.constexpr):  # type: ignore[no-untyped-def]
    """(the sums over 128 channels, which are on their way, and their scales)."""
    ws, xs, full, here, w_scale, x_scale = rest
    factor = gl.load(x_scale + k, mask=here, other=0.0) * gl.load(w_scale + k)
    stage = k % STAGES
    mbarrier.wait(full.index(stage), (k // STAGES) & 1)
    nothing = gl.zeros([64, 16], gl.float32, mma)
    sums = warpgroup_mma(
        ws.index(stage), xs.index(stage).permute((1, 0)), nothing, use_acc=False, is_async=True
    )
    return sums, factor


@gluon.jit  # type: ignore[untyped-decorator,unused-ignore]
def _add(acc, total, sums, factor, steps, STEPS_OF_PART: gl.constexpr):  # type: ignore[no-untyped-def]
    """One more block to the part's sum, and that to the whole one where the part ends."""
    acc += sums * gl.expand_dims(factor, 0)
    ends = steps % STEPS_OF_PART == 0
    total = gl.where(ends, total + acc, total)
    return gl.where(ends, 0.0, acc), total


@gluon.jit  # type: ignore[untyped-decorator,unused-ignore]
def _refill(  # type: ignore[no-untyped-def]
    x, w, ws, xs, full, k, w_row, x_column,
    stage_bytes: gl.constexpr, STEPS: gl.constexpr, DEPTH: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The stage of step k has been read: what comes STAGES steps later goes there."""
    if k + STAGES < STEPS:
        stage, channel = k % STAGES, (k + STAGES) * DEPTH
        mbarrier.expect(full.index(stage), stage_bytes)
        copy_tile(w, [w_row, channel], full.index(stage), ws.index(stage))
        copy_tile(x, [0, x_column + channel], full.index(stage), xs.index(stage))
