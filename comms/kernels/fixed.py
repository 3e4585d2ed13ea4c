# ruff: noqa: ANN001, ANN201, ANN202  (what Triton compiles has no Python types)
"""The associative sum of `comms/fixed.py` in kernels: integers on a grid that the token's range sets."""

import triton
import triton.language as tl

_STEPS = tl.constexpr(32768.0)  # of bfloat16 from zero to the range
_WHOLE = tl.constexpr(8388608.0)  # 2^23: fp32 from here on are integers
_ROUNDER, _ROUNDER_BITS = tl.constexpr(12582912.0), tl.constexpr(0x4B400000)  # 1.5 * 2^23


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def fixed_partial(  # type: ignore[no-untyped-def]
    y, places, weights, ranges, row, is_row, limit, H: tl.constexpr, K: tl.constexpr,
    BLOCK_H: tl.constexpr,
):  # fmt: skip
    """int32 [H], all channels, 0 if it is no row: the sum of round(weight * y * steps / range) over the row's pairs here;
    and what is the matter with it: 0, it fits 16 bits; 1, it may not; 2, a pair was refused.

    Added to 1.5 * 2^23, a number of at most 2^22 is rounded as it should be, half to even, and stands
    in the low bits of the sum. Rows with a larger one, a NaN or an Inf go the long way.
    """
    channel = tl.arange(0, BLOCK_H)
    token_range = tl.load(ranges + row)
    is_range = (token_range > 0) & (token_range < float("inf"))
    steps = tl.div_rn(_STEPS, tl.where(is_range, token_range, 1.0))
    steps = tl.where(is_range, steps, float("nan"))
    total_H = tl.zeros([BLOCK_H], tl.int32)
    strange_H = tl.zeros([BLOCK_H], tl.int32)
    for k in tl.static_range(K):
        place = tl.load(places + row * K + k, mask=is_row, other=-1)
        weight = tl.load(weights + row * K + k, mask=place >= 0, other=0.0)
        factor = tl.where(place >= 0, weight * steps, 0.0)
        at = tl.cast(place, tl.int64) * H + channel
        width = tl.where(place >= 0, H, 0)
        y_H = tl.load(y + at, mask=channel < width, other=0.0).to(tl.float32)
        bits_H = (y_H * factor + _ROUNDER).to(tl.int32, bitcast=True)
        total_H += bits_H - _ROUNDER_BITS
        strange_H = strange_H | (bits_H ^ _ROUNDER_BITS)
    # A sign or an exponent other than the rounder's gives itself away above the mantissa.
    is_large_H = (total_H > 32767) | (total_H < -32768) | ((strange_H >> 23) != 0)
    matter = tl.max(is_large_H.to(tl.int32), 0)
    if matter != 0:
        total_H, matter = _of_any_size(y, places, weights, row, steps, limit, H, K, BLOCK_H)
    return total_H, matter


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def from_steps(total_H, refused, token_range):  # type: ignore[no-untyped-def]
    """bf16: the number that so many steps are; NaN where a pair was refused."""
    step = token_range * (1.0 / _STEPS)
    return (total_H.to(tl.float32) * tl.where(refused, float("nan"), step)).to(tl.bfloat16)


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _of_any_size(  # type: ignore[no-untyped-def]
    y, places, weights, row, steps, limit, H: tl.constexpr, K: tl.constexpr, BLOCK_H: tl.constexpr
):  # fmt: skip
    """The same, 1 or 2, for outputs of any size; limit: the greatest summand that is not refused."""
    channel = tl.arange(0, BLOCK_H)
    total_H = tl.zeros([BLOCK_H], tl.int32)
    refused_H = tl.zeros([BLOCK_H], tl.int32)
    for k in range(K):
        place = tl.load(places + row * K + k)
        weight = tl.load(weights + row * K + k, mask=place >= 0, other=0.0)
        at = tl.cast(place, tl.int64) * H + channel
        is_here = channel < tl.where(place >= 0, H, 0)
        y_H = tl.load(y + at, mask=is_here, other=0.0).to(tl.float32)
        scaled_H = y_H * (weight * steps)
        size_H = tl.abs(scaled_H)
        fits_H = size_H <= limit  # a NaN does not
        refused_H = tl.where(is_here & (fits_H == 0), 1, refused_H)
        whole_H = tl.where(size_H < _WHOLE, (size_H + _WHOLE) - _WHOLE, size_H)
        whole_H = tl.where(scaled_H < 0, -whole_H, whole_H)
        total_H += tl.where(is_here & fits_H, whole_H, 0.0).to(tl.int32)
    return total_H, 1 + tl.max(refused_H, 0)
