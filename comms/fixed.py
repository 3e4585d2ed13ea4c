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

import numpy as np
import torch
from torch import Tensor

from comms.routes import Indices, Pairs
from comms.sizes import as_bytes

_EXACT_IN_FP32 = 2**24  # integers up to here, and their sums; fp64 has them all, at half the speed
_HEADER = struct.Struct("<ii")  # bytes of a body element, escapes


def steps_per_range(dtype: torch.dtype) -> float:
    """Grid steps from zero to the range. Powers of two, so scaling by them rounds nothing."""
    return 2.0**22 if dtype == torch.float32 else 2.0**15


def fixed_sum(y_PH: Tensor, pairs: Pairs, range_R: Tensor) -> Tensor:
    """total_RC, int32: the sum of each row's pairs on its grid, and its number of refused pairs.

    The K of the pairs is that of the token, also where most of its pairs are elsewhere. range_R is
    fp32; one that is not positive and finite refuses its pairs.
    """
    num_rows, num_topk, hidden = pairs.num_rows, pairs.num_topk, y_PH.shape[1]
    limit = _greatest_summand(num_topk)
    factor_R = torch.where(
        (range_R > 0) & (range_R < torch.inf), steps_per_range(y_PH.dtype) / range_R, torch.nan
    )
    rows_P = torch.from_numpy(pairs.rows_P)
    factors_P = factor_R[rows_P].mul_(torch.from_numpy(pairs.weights_P))
    refused_R = torch.zeros(num_rows, dtype=torch.int32)
    sums_RH = torch.zeros((num_rows, hidden))
    for tile in pairs.tiles(hidden):
        scaled_VH = y_PH[tile].to(torch.float32, copy=True).mul_(factors_P[tile, None])
        peak_V = torch.maximum(scaled_VH.amax(dim=1), -scaled_VH.amin(dim=1))
        if not peak_V.max() <= limit:  # a NaN is not
            refused_V = ~(peak_V <= limit)
            scaled_VH.masked_fill_(refused_V[:, None], 0.0)
            peak_V.masked_fill_(refused_V, 0.0)
            refused_R.index_add_(0, rows_P[tile], refused_V.to(torch.int32))
        if peak_V.max() * num_topk > _EXACT_IN_FP32:
            sums_RH = sums_RH.double()
        sums_RH.index_add_(0, rows_P[tile], scaled_VH.round_().to(sums_RH.dtype))
    total_RC = torch.empty((num_rows, hidden + 1), dtype=torch.int32)
    total_RC[:, :hidden] = sums_RH
    total_RC[:, hidden] = refused_R
    return total_RC


def add_rows(total_TC: Tensor, part_VC: Tensor, rows_V: Indices) -> None:
    """total[rows] += part, no row twice. (In numpy: torch's index_add_ of int32 is 6 times slower.)"""
    total_TC.numpy()[rows_V] += part_VC.numpy()


def to_floats(total_TC: Tensor, range_T: Tensor, dtype: torch.dtype) -> Tensor:
    """out_TH: the sums in `dtype`, NaN throughout where a pair was refused."""
    step_T = range_T / steps_per_range(dtype)
    step_T = torch.where(total_TC[:, -1] > 0, torch.nan, step_T)
    return (total_TC[:, :-1].float().mul_(step_T[:, None])).to(dtype)


def pack_sums(total_VC: Tensor, dtype: torch.dtype) -> Tensor:
    """A uint8 message that says all of `total_VC`, mostly in 2 bytes an element (fp32: 4).

    Header (bytes of an element, number of escapes), elements [V, H] (low parts), padding to 4, then
    of each escape the index into [V, C] (int32) and what to add there, in units of 2^16 for a
    channel and of one for the count of refused pairs (int16).
    """
    num_rows, columns = total_VC.shape
    body = torch.int32 if dtype == torch.float32 else torch.int16
    escaped = _escapes(total_VC, body)
    indices, values = escaped.to(torch.int32), total_VC.reshape(-1)[escaped]
    is_channel = escaped % columns < columns - 1
    highs = torch.where(is_channel, (values - values.to(torch.int16)) >> 16, values)
    start = _HEADER.size
    end = start + num_rows * (columns - 1) * body.itemsize
    escapes = -(-end // 4) * 4
    message = torch.empty(escapes + 6 * len(escaped), dtype=torch.uint8)
    message[:start] = torch.frombuffer(
        bytearray(_HEADER.pack(body.itemsize, len(escaped))), dtype=torch.uint8
    )
    message[start:end].view(body).view(num_rows, columns - 1).copy_(total_VC[:, :-1])
    message[end:escapes] = 0
    message[escapes : escapes + 4 * len(escaped)] = as_bytes(indices)
    message[escapes + 4 * len(escaped) :] = as_bytes(highs.to(torch.int16))
    return message


def unpack_sums(message: Tensor, num_rows: int, hidden: int) -> Tensor:
    """total_VC, int32. Raises ValueError for a message of another size."""
    itemsize, num_escapes = _HEADER.unpack(message[: _HEADER.size].numpy().tobytes())
    start = _HEADER.size
    end = start + num_rows * hidden * itemsize
    escapes = -(-end // 4) * 4
    if message.shape[0] != escapes + 6 * num_escapes:
        raise ValueError(
            f"expected {escapes + 6 * num_escapes} bytes of {num_rows} rows of {hidden} channels "
            f"({itemsize} bytes each, {num_escapes} escapes), got {message.shape[0]}"
        )
    total_VC = torch.zeros((num_rows, hidden + 1), dtype=torch.int32)
    if message.data_ptr() % 4:
        message = message.clone()
    body = torch.int32 if itemsize == 4 else torch.int16
    total_VC[:, :-1] = message[start:end].view(body).view(num_rows, hidden)
    if num_escapes:
        middle = escapes + 4 * num_escapes
        indices = message[escapes:middle].view(torch.int32).long()
        highs = message[middle:].view(torch.int16).to(torch.int32)
        is_channel = indices % (hidden + 1) < hidden
        total_VC.view(-1)[indices] += torch.where(is_channel, highs << 16, highs)
    return total_VC


def _escapes(total_VC: Tensor, body: torch.dtype) -> Tensor:
    """Indices into [V, C] of what the body of a message cannot say, int64."""
    channels_VH = total_VC[:, :-1]
    escaped_V = total_VC[:, -1] > 0
    if body == torch.int16 and total_VC.numel():
        limits = torch.iinfo(torch.int16)
        escaped_V |= (channels_VH.amax(dim=1) > limits.max) | (channels_VH.amin(dim=1) < limits.min)
    rows = escaped_V.nonzero()[:, 0]
    low_VC = total_VC[rows]
    rest_VC = low_VC - low_VC.to(body)
    rest_VC[:, -1] = low_VC[:, -1]
    positions = rest_VC.nonzero()
    return rows[positions[:, 0]] * total_VC.shape[1] + positions[:, 1]


def _greatest_summand(num_topk: int) -> float:
    """The greatest fp32 number of which num_topk are still below 2^31."""
    return float(np.nextafter(np.float32(2**31 / num_topk), np.float32(0)))
