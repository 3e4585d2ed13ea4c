# ruff: noqa: ANN001, ANN201, ANN202  (what Triton compiles has no Python types)
"""The kernels of `experts/kernels/combine.py`: sums of fp32, and sums of integers on a row's grid.

A program has some channels of a row. Where most of a row's pairs are elsewhere it looks them up one by
one; else it asks for all at once. Both add in top-k order.

Legend: R rows, H hidden, K experts per token, P places.
"""

from __future__ import annotations

import triton
import triton.language as tl

from experts.kernels.early import let_next_start, wait_for_inputs
from experts.kernels.norm import normed
from experts.kernels.quantize import store_quantized

_ROUNDER: tl.constexpr = tl.constexpr(12582912.0)
"""1.5 * 2^23: what is added to it, up to 2^22, is rounded to a whole number in its lowest bits."""
_ROUNDER_BITS: tl.constexpr = tl.constexpr(0x4B400000)
_LARGE_BITS: tl.constexpr = tl.constexpr(0x4A800000)  # of 2^22


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def exact(  # type: ignore[no-untyped-def]
    y, place_in, weights, extra, out,
    residual, gain, added_out, q_out, scale_out, eps,
    H: tl.constexpr, K: tl.constexpr, K_PAD: tl.constexpr, FEW: tl.constexpr, BLOCK: tl.constexpr,
    EXTRA: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """residual: as `fixed` has it."""
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < H
    gains = _gains(gain, at, inside)
    wait_for_inputs(EARLY)
    let_next_start(EARLY)
    total = tl.zeros([BLOCK], tl.float32)
    if _are_few(place_in, row, residual, FEW, K, K_PAD):
        for k in tl.static_range(K):
            place = tl.load(place_in + row * K + k)
            if place >= 0:
                values = values_of(y, place, at, inside, H)
                total += values * tl.load(weights + row * K + k)
    else:  # all loads at once
        for k in tl.static_range(K):
            place = tl.load(place_in + row * K + k)
            here = inside & (place + 0 * at >= 0)
            values = values_of(y, place, at, here, H)
            total += tl.where(here, values * tl.load(weights + row * K + k), 0.0)
    if residual is not None:
        rounded = rounded_sum(extra, total, row, at, inside, H, EXTRA)
        _store_norm(
            rounded, residual, gains, added_out, out, q_out, scale_out, eps,
            row, at, inside, H, BLOCK,
        )  # fmt: skip
    else:
        store_sum(out, extra, total, row, at, inside, H, EXTRA)


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def fixed(  # type: ignore[no-untyped-def]
    y, place_in, weights, ranges, extra, out, large_out,
    residual, gain, added_out, q_out, scale_out, eps,
    LIMIT: tl.constexpr, WHOLE: tl.constexpr,
    H: tl.constexpr, K: tl.constexpr, K_PAD: tl.constexpr, FEW: tl.constexpr, BLOCK: tl.constexpr,
    EXTRA: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Right if no summand is beyond 2^22 steps. `large_out` says where one is, for `fixed_large`; a
    program that has a WHOLE row sees to it at once. With `residual` it also adds that, to `added_out`,
    and `out` is that sum's norm, to `q_out` and `scale_out` also in FP8."""
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < H
    gains = _gains(gain, at, inside)
    wait_for_inputs(EARLY)
    let_next_start(EARLY)
    steps, step = _steps(ranges + row)
    total = tl.zeros([BLOCK], tl.int32)
    peak = tl.zeros([BLOCK], tl.int32)
    if _are_few(place_in, row, residual, FEW, K, K_PAD):
        for k in tl.static_range(K):
            place = tl.load(place_in + row * K + k)
            if place >= 0:
                scaled = values_of(y, place, at, inside, H) * (
                    tl.load(weights + row * K + k) * steps
                )
                scaled = tl.where(inside, scaled, 0.0)
                total += (scaled + _ROUNDER).to(tl.int32, bitcast=True) - _ROUNDER_BITS
                peak = tl.maximum(peak, scaled.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    else:  # all loads at once
        for k in tl.static_range(K):
            place = tl.load(place_in + row * K + k)
            here = inside & (place + 0 * at >= 0)
            scaled = values_of(y, place, at, here, H) * (tl.load(weights + row * K + k) * steps)
            scaled = tl.where(here, scaled, 0.0)
            total += (scaled + _ROUNDER).to(tl.int32, bitcast=True) - _ROUNDER_BITS
            peak = tl.maximum(peak, scaled.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    is_large = tl.max(peak, 0) > _LARGE_BITS  # a NaN is
    if residual is not None:
        rounded = rounded_sum(extra, total.to(tl.float32) * step, row, at, inside, H, EXTRA)
        if is_large:
            _fixed_row(y, place_in, weights, ranges, extra, out, row, LIMIT, H, K, BLOCK, EXTRA)
            tl.debug_barrier()  # what other threads have stored is read
            rounded = tl.load(out + row * H + at, mask=inside, other=0.0)
            tl.debug_barrier()
        _store_norm(
            rounded, residual, gains, added_out, out, q_out, scale_out, eps,
            row, at, inside, H, BLOCK,
        )  # fmt: skip
    elif WHOLE:
        if is_large:
            _fixed_row(y, place_in, weights, ranges, extra, out, row, LIMIT, H, K, BLOCK, EXTRA)
        else:
            store_sum(out, extra, total.to(tl.float32) * step, row, at, inside, H, EXTRA)
    else:
        store_sum(out, extra, total.to(tl.float32) * step, row, at, inside, H, EXTRA)
        at_large = large_out + row * tl.num_programs(1) + tl.program_id(1)
        tl.store(at_large, is_large.to(tl.int32))


@triton.jit(do_not_specialize=["num_rows"])  # type: ignore[untyped-decorator,unused-ignore]
def fixed_large(  # type: ignore[no-untyped-def]
    y, place_in, weights, ranges, extra, out, large, num_rows,
    LIMIT: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr, TILES_PAD: tl.constexpr,
    H: tl.constexpr, K: tl.constexpr, K_PAD: tl.constexpr, BLOCK: tl.constexpr, EXTRA: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """The rows that have such a summand once more, with any number and with refused pairs: seldom."""
    wait_for_inputs(EARLY)
    let_next_start(EARLY)
    first, tile = tl.program_id(0) * ROWS, tl.arange(0, TILES_PAD)
    rows = (first + tl.arange(0, ROWS))[:, None]
    here = (rows < num_rows) & (tile[None, :] < TILES)
    found = tl.load(large + rows * TILES + tile[None, :], mask=here, other=0)
    if tl.max(tl.max(found, 1), 0) > 0:
        for i in range(ROWS):
            row = (first + i).to(tl.int64)
            mask = (tile < TILES) & (row * TILES + tile < num_rows * TILES)
            if tl.max(tl.load(large + row * TILES + tile, mask=mask, other=0), 0) > 0:
                _fixed_row(y, place_in, weights, ranges, extra, out, row, LIMIT, H, K, BLOCK, EXTRA)


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _fixed_row(  # type: ignore[no-untyped-def]
    y, place_in, weights, ranges, extra, out, row,
    LIMIT: tl.constexpr, H: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr, EXTRA: tl.constexpr,
):  # fmt: skip
    steps, step = _steps(ranges + row)
    refused = tl.zeros([BLOCK], tl.int32)
    for start in range(0, H, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < H
        total = tl.zeros([BLOCK], tl.int32)
        for k in range(K):
            place = tl.load(place_in + row * K + k)
            here = inside & (place + 0 * at >= 0)
            scaled = values_of(y, place, at, here, H) * (tl.load(weights + row * K + k) * steps)
            fits = tl.abs(scaled) <= LIMIT  # a NaN does not
            refused |= (here & ~fits).to(tl.int32)
            total += _rounded(tl.where(here & fits, scaled, 0.0))
        store_sum(out, extra, total.to(tl.float32) * step, row, at, inside, H, EXTRA)
    if tl.max(refused, 0) > 0:
        for start in range(0, H, BLOCK):
            at = start + tl.arange(0, BLOCK)
            nothing = tl.full([BLOCK], float("nan"), tl.float32)
            store_sum(out, extra, nothing, row, at, at < H, H, False)


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _steps(range_at):  # type: ignore[no-untyped-def]
    """(steps to one, NaN for a range that cannot be; one step)."""
    reach = tl.load(range_at)
    steps = tl.div_rn(tl.full([1], 32768.0, tl.float32), tl.zeros([1], tl.float32) + reach)
    steps = tl.where((reach > 0) & (reach < float("inf")), steps, float("nan"))
    return steps, reach * (1.0 / 32768.0)  # a power of two: exact, or as rounded as a division


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def number_here(place_in, row, K: tl.constexpr, K_PAD: tl.constexpr):  # type: ignore[no-untyped-def]
    """How many pairs of the row are here."""
    k = tl.arange(0, K_PAD)
    return tl.sum((tl.load(place_in + row * K + k, mask=k < K, other=-1) >= 0).to(tl.int32), 0)


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _are_few(  # type: ignore[no-untyped-def]
    place_in, row, residual, FEW: tl.constexpr, K: tl.constexpr, K_PAD: tl.constexpr
):
    """Whether most pairs of the row are elsewhere; who norms is alone, and has them all."""
    few = False
    if residual is None:
        few = number_here(place_in, row, K, K_PAD) <= FEW
    return few


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def values_of(y, place, at, here, H: tl.constexpr):  # type: ignore[no-untyped-def]
    return tl.load(y + place.to(tl.int64) * H + at, mask=here, other=0.0).to(tl.float32)


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _rounded(x):  # type: ignore[no-untyped-def]
    """rint(x) as int32: adding 2^23 leaves no place for a fraction; from there on there is none."""
    magnitude = tl.abs(x)
    whole = tl.where(magnitude < 8388608.0, (magnitude + 8388608.0) - 8388608.0, magnitude)
    number = whole.to(tl.int32)
    return tl.where(x < 0, -number, number)


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def store_sum(out, extra, total, row, at, inside, H: tl.constexpr, EXTRA: tl.constexpr):  # type: ignore[no-untyped-def]
    rounded = rounded_sum(extra, total, row, at, inside, H, EXTRA)
    tl.store(out + row * H + at, rounded, mask=inside)


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def rounded_sum(extra, total, row, at, inside, H: tl.constexpr, EXTRA: tl.constexpr):  # type: ignore[no-untyped-def]
    rounded = total.to(tl.bfloat16)
    if EXTRA:
        more = tl.load(extra + row * H + at, mask=inside, other=0.0).to(tl.float32)
        rounded = (rounded.to(tl.float32) + more).to(tl.bfloat16)
    return rounded


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _gains(gain, at, inside):  # type: ignore[no-untyped-def]
    """Of the norm: nobody writes them, they are read before the kernel ahead has ended."""
    gains = at
    if gain is not None:
        gains = tl.load(gain + at, mask=inside, other=0.0).to(tl.float32)
    return gains


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _store_norm(  # type: ignore[no-untyped-def]
    rounded, residual, gains, added_out, out, q_out, scale_out, eps, row, at, inside,
    H: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """As `cluster/model/cuda/fused.py` adds and norms."""
    before = tl.load(residual + row * H + at, mask=inside, other=0.0).to(tl.float32)
    added = tl.where(inside, before + rounded.to(tl.float32), 0.0).to(tl.bfloat16)
    tl.store(added_out + row * H + at, added, mask=inside)
    norm = normed(added.to(tl.float32), gains, eps, H, BLOCK).to(tl.bfloat16)
    tl.store(out + row * H + at, norm, mask=inside)
    if q_out is not None:
        store_quantized(norm, q_out, scale_out, row, H, BLOCK)
