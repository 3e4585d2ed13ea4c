# ruff: noqa: ANN001, ANN201, ANN202  (what Triton compiles has no Python types)
"""The kernels of `experts.kernels.linear`: one that reads by pointers, one by tensor descriptors.

Legend: T tokens, O output and I input channels, N independent products.
"""

from __future__ import annotations

import triton
import triton.language as tl

from experts.kernels.early import let_next_start, wait_for_inputs
from experts.kernels.prefetch import prefetch
from experts.kernels.product import product

LINE: tl.constexpr = tl.constexpr(32)
"""Numbers that are asked for at once, 128 bytes of fp32."""


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def by_pointers(  # type: ignore[no-untyped-def]
    x, w, out, x_scale, w_scale, partial, counts,
    num_tokens, outputs, inputs, part_size, x_token, x_number, out_token, out_number,
    BLOCK_O: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_I: tl.constexpr, EVEN: tl.constexpr,
    SCALED: tl.constexpr, PARTS: tl.constexpr, SPREAD: tl.constexpr, JOINED: tl.constexpr,
    TOKENS_FIRST: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One tile of outputs and tokens: all parts of it, or (SPREAD) one part, the last adding all up if they are
    to be JOINED."""
    o_tiles, t_tiles = tl.cdiv(outputs, BLOCK_O), tl.cdiv(num_tokens, BLOCK_T)
    o_tile, t_tile = _place(tl.program_id(0), o_tiles, t_tiles)
    number = tl.program_id(1).to(tl.int64)
    o = o_tile * BLOCK_O + tl.arange(0, BLOCK_O)
    t = t_tile * BLOCK_T + tl.arange(0, BLOCK_T)
    o_here, t_here = o < outputs, t < num_tokens
    # Outputs beyond the last read the first of their tile: their sums are not stored. Tokens beyond
    # the last are not read at all: every program would ask for the same row again and again.
    o_read = tl.where(o_here, o, o_tile * BLOCK_O).to(tl.int64)
    t_read = tl.where(t_here, t, t_tile * BLOCK_T).to(tl.int64)
    w_rows = w + (number * outputs + o_read[:, None]) * inputs
    if SPREAD:
        line = tl.arange(0, BLOCK_I // LINE)[None, :] * LINE
        for i in range(tl.program_id(2) * part_size, (tl.program_id(2) + 1) * part_size, BLOCK_I):
            prefetch(w_rows + tl.minimum(i + line, inputs - 1), EARLY)
    wait_for_inputs(EARLY)
    let_next_start(EARLY)
    x_rows = x + number * x_number + t_read[:, None] * x_token
    if SCALED:
        blocks = tl.cdiv(inputs, 128)
        x_scale += t_read * blocks
        w_scale += (o_tile * BLOCK_O // 128).to(tl.int64) * blocks
    # (To be stored side by side, outputs must be known to follow each other.)
    t_side, o_side = _sides(t.to(tl.int64), o, TOKENS_FIRST)
    t_stored, o_stored = _sides(t_here, o_here, TOKENS_FIRST)
    here = t_stored & o_stored
    if PARTS == 1:
        total = _walk(
            x_rows, w_rows, t_here, x_scale, w_scale, 0, inputs, inputs,
            BLOCK_O, BLOCK_T, BLOCK_I, EVEN, SCALED, TOKENS_FIRST,
        )  # fmt: skip
    elif not SPREAD:
        total = _zeros(BLOCK_O, BLOCK_T, TOKENS_FIRST)
        for part in range(PARTS):
            first = part * part_size
            total += _walk(
                x_rows, w_rows, t_here, x_scale, w_scale, first,
                tl.minimum(first + part_size, inputs), inputs,
                BLOCK_O, BLOCK_T, BLOCK_I, EVEN, SCALED, TOKENS_FIRST,
            )  # fmt: skip
    else:
        first = tl.program_id(2) * part_size
        total = _walk(
            x_rows, w_rows, t_here, x_scale, w_scale, first,
            tl.minimum(first + part_size, inputs), inputs,
            BLOCK_O, BLOCK_T, BLOCK_I, EVEN, SCALED, TOKENS_FIRST,
        )  # fmt: skip
        at = partial + (number * num_tokens + t_side) * outputs + o_side
        each = tl.num_programs(1).to(tl.int64) * num_tokens * outputs
        tl.store(at + tl.program_id(2) * each, total, mask=here)
        if JOINED:
            tl.debug_barrier()  # all of the tile is stored before it is counted
            count = counts + number * tl.num_programs(0) + tl.program_id(0)
            if tl.atomic_add(count, 1, sem="acq_rel") < PARTS - 1:
                return
            tl.store(count, 0)  # for the next call
            total = _zeros(BLOCK_O, BLOCK_T, TOKENS_FIRST)
            for part in tl.static_range(PARTS):
                total += tl.load(at + part * each, mask=here, other=0.0, cache_modifier=".cg")
    if not SPREAD or JOINED:
        at_out = out + number * out_number + t_side * out_token + o_side
        tl.store(at_out, total.to(out.dtype.element_ty), mask=here)


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def by_descriptors(  # type: ignore[no-untyped-def]
    x, w, out, num_tokens, outputs, inputs,
    BLOCK_O: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_I: tl.constexpr, TOKENS_FIRST: tl.constexpr,
    LOOPED: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One tile of bf16: what the copy engine reads beyond an edge is 0, and it writes nothing there.

    LOOPED: inside a loop of one turn, which makes the compiler keep the output's buffer apart from
    the operands'. Tiles of 8 warps are a quarter faster for it, those of 4 a little slower.
    """
    o_tiles, t_tiles = tl.cdiv(outputs, BLOCK_O), tl.cdiv(num_tokens, BLOCK_T)
    wait_for_inputs(EARLY)
    let_next_start(EARLY)
    if LOOPED:
        for program in tl.range(tl.program_id(0), o_tiles * t_tiles, tl.num_programs(0)):
            _describe(
                x,
                w,
                out,
                program,
                o_tiles,
                t_tiles,
                inputs,
                BLOCK_O,
                BLOCK_T,
                BLOCK_I,
                TOKENS_FIRST,
            )
    else:
        _describe(
            x, w, out, tl.program_id(0), o_tiles, t_tiles, inputs,
            BLOCK_O, BLOCK_T, BLOCK_I, TOKENS_FIRST,
        )  # fmt: skip


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _describe(  # type: ignore[no-untyped-def]
    x, w, out, program, o_tiles, t_tiles, inputs,
    BLOCK_O: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_I: tl.constexpr, TOKENS_FIRST: tl.constexpr,
):  # fmt: skip
    o_tile, t_tile = _place(program, o_tiles, t_tiles)
    acc = _zeros(BLOCK_O, BLOCK_T, TOKENS_FIRST)
    for i in range(0, inputs, BLOCK_I):
        x_tile = x.load([t_tile * BLOCK_T, i])
        w_tile = w.load([o_tile * BLOCK_O, i])
        acc = product(x_tile, w_tile, acc) if TOKENS_FIRST else product(w_tile, x_tile, acc)
    stored = acc if TOKENS_FIRST else acc.T
    out.store([t_tile * BLOCK_T, o_tile * BLOCK_O], stored.to(out.dtype))


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _place(program, o_tiles, t_tiles):  # type: ignore[no-untyped-def]
    """Tile of a program: 8 tiles of outputs side by side for all tokens, so that both stay in L2."""
    group = 8 * t_tiles
    first = program // group * 8
    size = tl.minimum(o_tiles - first, 8)
    return first + program % group % size, program % group // size


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _zeros(BLOCK_O: tl.constexpr, BLOCK_T: tl.constexpr, TOKENS_FIRST: tl.constexpr):  # type: ignore[no-untyped-def]
    shape: tl.constexpr = [BLOCK_T, BLOCK_O] if TOKENS_FIRST else [BLOCK_O, BLOCK_T]
    return tl.zeros(shape, tl.float32)


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _sides(of_token, of_output, TOKENS_FIRST: tl.constexpr):  # type: ignore[no-untyped-def]
    """Both as they lie along a tile."""
    if TOKENS_FIRST:
        sides = of_token[:, None], of_output[None, :]
    else:
        sides = of_token[None, :], of_output[:, None]
    return sides


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _walk(  # type: ignore[no-untyped-def]
    x_rows, w_rows, t_here, x_scale, w_scale, first, last, inputs,
    BLOCK_O: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_I: tl.constexpr, EVEN: tl.constexpr,
    SCALED: tl.constexpr, TOKENS_FIRST: tl.constexpr,
):  # fmt: skip
    """The sum over channels first..last of rows [O, I] by rows [T, I], in order."""
    acc = _zeros(BLOCK_O, BLOCK_T, TOKENS_FIRST)
    step = tl.arange(0, BLOCK_I)
    for start in range(first, last, BLOCK_I):
        i = start + step
        if EVEN:
            w_tile = tl.load(w_rows + i[None, :])
            x_tile = tl.load(x_rows + i[None, :], mask=t_here[:, None], other=0.0)
        else:
            i_here = (i < inputs)[None, :]
            w_tile = tl.load(w_rows + i[None, :], mask=i_here, other=0.0)
            x_tile = tl.load(x_rows + i[None, :], mask=t_here[:, None] & i_here, other=0.0)
        if SCALED:  # the accumulators of 8-bit products are short: 128 channels, then fp32
            block = start // 128
            scale = tl.load(x_scale + block) * tl.load(w_scale + block)
            if TOKENS_FIRST:
                acc += product(x_tile, w_tile, tl.zeros_like(acc)) * scale[:, None]
            else:
                acc += product(w_tile, x_tile, tl.zeros_like(acc)) * scale[None, :]
        elif w_tile.dtype == tl.float32:
            high = w_tile.to(tl.bfloat16)
            rest = w_tile - high.to(tl.float32)
            middle = rest.to(tl.bfloat16)
            low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
            acc = product(low, x_tile, acc)
            acc = product(middle, x_tile, acc)
            acc = product(high, x_tile, acc)
        elif TOKENS_FIRST:
            acc = product(x_tile, w_tile, acc)
        else:
            acc = product(w_tile, x_tile, acc)
    return acc
