"""The associative sum: the same bits however the experts are grouped onto ranks and nodes.

Legend: T tokens, R rows, V rows of a message, K top-k, P pairs, H hidden, C = H + 1 columns.

Floating-point sums depend on what is added first, so on which experts share a node. Here every
weighted expert output is rounded once to a grid, and what is added is integers:

    q     = round(weight * y * (2^15 / range))     of one (token, k) pair, elementwise in fp32
    total = sum of q                               int32, exact, in any order and grouping
    out   = total * (range * 2^-15)                once, at the token's origin

`range` is a bound that the token's output should rarely exceed; it travels with the token. Rows of
bfloat16 and float16 have 2^15 steps to the range, so that partial sums cross the network in 16
bits; fp32 rows have 2^22 steps and cross in 32.

The range only decides precision and bytes, never the result. A partial sum beyond 16 bits travels
as its low part plus an *escape* with the rest. A pair with a NaN, an Inf, or a value so large that
K of them could overflow 32 bits is *refused*: it adds nothing to the channels and one to the last
column, which counts refused pairs, and a row with any decodes to NaN throughout. That column is
summed like the others, so the fate of a row does not depend on any order either.
"""

import struct
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from comms.codecs import aligned
from comms.routes import Indices, Pairs

_EXACT_IN_FP32 = 2**24  # integers up to here, and their sums; fp64 has them all, at half the speed
_HEADER = struct.Struct("<ii")  # bytes of a body element, escapes
_ESCAPE_BYTES = 6  # an int32 index and an int16 value


def steps_per_range(dtype: torch.dtype) -> float:
    """Grid steps from zero to the range. Powers of two, so scaling by them rounds nothing."""
    return 2.0**22 if dtype == torch.float32 else 2.0**15


def fixed_sum(y_PH: Tensor, pairs: Pairs, range_R: Tensor) -> Tensor:
    """total_RC, int32: the sum of each row's pairs on its grid, and its number of refused pairs.

    The K of the pairs is that of the token, also where most of its pairs are elsewhere. range_R is
    fp32; one that is not positive and finite refuses its pairs.
    """
    num_rows, num_topk, hidden = pairs.num_rows, pairs.num_topk, y_PH.shape[1]
    limit = greatest_summand(num_topk)
    rows_P = torch.from_numpy(pairs.rows_P)
    factors_P = torch.from_numpy(_factors(pairs, range_R.numpy(), y_PH.dtype))
    refused_R = torch.zeros(num_rows, dtype=torch.int32)
    sums_RH = torch.zeros((num_rows, hidden))
    for tile in pairs.tiles(hidden):
        scaled_VH = y_PH[tile].to(torch.float32, copy=True).mul_(factors_P[tile, None])
        peak = _peak(scaled_VH)
        if not peak <= limit:  # a NaN is not
            refused_V = ~(scaled_VH.abs().amax(dim=1) <= limit)
            scaled_VH.masked_fill_(refused_V[:, None], 0.0)
            refused_R.index_add_(0, rows_P[tile], refused_V.to(torch.int32))
            peak = _peak(scaled_VH)
        if peak * num_topk > _EXACT_IN_FP32:
            sums_RH = sums_RH.double()
        sums_RH.index_add_(0, rows_P[tile], scaled_VH.round_().to(sums_RH.dtype))
    total_RC = torch.empty((num_rows, hidden + 1), dtype=torch.int32)
    total_RC[:, :hidden] = sums_RH
    total_RC[:, hidden] = refused_R
    return total_RC


def add_rows(total_TC: Tensor, part_VC: Tensor, rows_V: Indices) -> None:
    """total[rows] += part, rows ascending and none twice.

    In numpy: torch's index_add_ of int32 is 6 times slower.
    """
    if len(rows_V) == len(total_TC):
        total_TC += part_VC
    else:
        total_TC.numpy()[rows_V] += part_VC.numpy()


def to_floats(total_TC: Tensor, range_T: Tensor, dtype: torch.dtype) -> Tensor:
    """out_TH: the sums in `dtype`, NaN throughout where a pair was refused."""
    step_T = range_T.numpy() / np.float32(steps_per_range(dtype))
    step_T[total_TC[:, -1].numpy() > 0] = np.nan
    return total_TC[:, :-1].float().mul_(torch.from_numpy(step_T)[:, None]).to(dtype)


def pack_sums(total_VC: Tensor, dtype: torch.dtype) -> Tensor:
    """A uint8 message that says all of `total_VC`, mostly in 2 bytes an element (fp32: 4).

    Header (bytes of an element, number of escapes), elements [V, H] (low parts), padding to 4, then
    of each escape the index into [V, C] (int32) and what to add there, in units of 2^16 for a
    channel and of one for the count of refused pairs (int16).
    """
    num_rows, columns = total_VC.shape
    body = np.dtype(np.int32 if dtype == torch.float32 else np.int16)
    indices, values = _escapes(total_VC, body)
    end = _HEADER.size + num_rows * (columns - 1) * body.itemsize
    escapes = aligned(end, 4)
    message = np.empty(sums_bytes(num_rows, columns - 1, dtype, len(indices)), np.uint8)
    _HEADER.pack_into(message.data, 0, body.itemsize, len(indices))
    body_VH = message[_HEADER.size : end].view(body).reshape(num_rows, columns - 1)
    body_VH[...] = total_VC.numpy()[:, :-1]  # the low part of what does not fit
    message[end:escapes] = 0
    message[escapes : escapes + 4 * len(indices)].view(np.int32)[...] = indices
    message[escapes + 4 * len(indices) :].view(np.int16)[...] = values
    return torch.from_numpy(message)


def sums_bytes(num_rows: int, hidden: int, dtype: torch.dtype, num_escapes: int = 0) -> int:
    """Length of the message of so many rows, at least one."""
    itemsize = 4 if dtype == torch.float32 else 2
    return aligned(_HEADER.size + num_rows * hidden * itemsize, 4) + _ESCAPE_BYTES * num_escapes


def num_escapes(message: Tensor) -> int:
    """How many of its elements the body of a message could not say."""
    _, escapes = _HEADER.unpack_from(message.numpy().data)
    return int(escapes)


def unpack_sums(message: Tensor, num_rows: int, hidden: int) -> Tensor:
    """total_VC, int32. Raises ValueError for a message of another size."""
    data = message.numpy()
    itemsize, count = _HEADER.unpack_from(data.data)
    end = _HEADER.size + num_rows * hidden * itemsize
    escapes = aligned(end, 4)
    if len(data) != escapes + _ESCAPE_BYTES * count:
        raise ValueError(
            f"expected {escapes + _ESCAPE_BYTES * count} bytes of {num_rows} rows of {hidden} "
            f"channels ({itemsize} bytes each, {count} escapes), got {len(data)}"
        )
    total_VC = np.empty((num_rows, hidden + 1), np.int32)
    body = np.int32 if itemsize == 4 else np.int16
    total_VC[:, :-1] = data[_HEADER.size : end].view(body).reshape(num_rows, hidden)
    total_VC[:, -1] = 0
    if count:
        middle = escapes + 4 * count
        indices = data[escapes:middle].view(np.int32)
        values = data[middle:].view(np.int16).astype(np.int32)
        values[indices % (hidden + 1) < hidden] <<= 16
        total_VC.reshape(-1)[indices] += values
    return torch.from_numpy(total_VC)


def _escapes(total_VC: Tensor, body: np.dtype[Any]) -> tuple[Indices, NDArray[np.int32]]:
    """Indices into [V, C] of what the body of a message cannot say, and what is missing there."""
    total, limits = total_VC.numpy(), np.iinfo(body)
    refused_V = total[:, -1] > 0
    if (
        not refused_V.any()
        and limits.min <= total.min(initial=0) <= total.max(initial=0) <= limits.max
    ):
        return np.empty(0, np.int64), np.empty(0, np.int32)
    escaped_VC = (total > limits.max) | (total < limits.min)
    escaped_VC[:, -1] = refused_V
    indices = escaped_VC.reshape(-1).nonzero()[0]
    values = total.reshape(-1)[indices]
    is_channel = (indices + 1) % total.shape[1] > 0
    high = (values - values.astype(body)) >> 16
    return indices, np.where(is_channel, high, values)


def _factors(pairs: Pairs, range_R: NDArray[np.float32], dtype: torch.dtype) -> NDArray[np.float32]:
    """What each pair is multiplied with; NaN, which refuses it, for a range that cannot be."""
    with np.errstate(all="ignore"):
        steps_R = np.float32(steps_per_range(dtype)) / range_R
        steps_R[~((range_R > 0) & (range_R < np.inf))] = np.nan
        factors_P: NDArray[np.float32] = pairs.weights_P * steps_R[pairs.rows_P]
    return factors_P


def _peak(x_VH: Tensor) -> float:
    """The greatest magnitude, NaN if there is a NaN. (In numpy: half the time of torch's aminmax.)"""
    array = x_VH.numpy()
    return float(max(-array.min(), array.max()))


def greatest_summand(num_topk: int) -> float:
    """The greatest fp32 number of which num_topk are still below 2^31."""
    return float(np.nextafter(np.float32(2**31 / num_topk), np.float32(0)))
