"""Codecs: how the channels of a row become bytes, and what that costs in accuracy.

Legend: R rows, H hidden, B blocks of consecutive channels (the last may be short), C channels of a
block.

    name          bytes an element    what a block of channels shares           relative L2, normal data
    bfloat16      that of the dtype   nothing: rows in the model's own dtype    0
    float8        1.031               fp32 scale of 128 e4m3                    0.0257
    float8_ue8m0  1.008               power-of-two scale of 128 e4m3            0.0266
    logfmt10      1.281               least and greatest magnitude of 128       0.0036
    int6          0.781               16-bit scale of 64 integers               0.0243
    int8          1.016               16-bit scale of 128 integers              0.0065
    int10         1.266               16-bit scale of 128 integers              0.0016

Of the lossy ones all promise:

- a row's bytes depend on that row alone, and so do the values they decode to;
- a block with a NaN or an Inf decodes to NaN throughout; other blocks are not touched;
- zero stays zero, and a finite value never becomes infinite.

Work goes over a few rows at a time, so that temporaries stay in the cache.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from comms.bits import pack_bits, packed_bytes, unpack_bits
from comms.sizes import as_bytes

BLOCK = 128  # channels that share a scale, unless a codec says otherwise
FP8_MAX = 448.0
MIN_AMAX = 1e-4

_TILE = 512 * 1024  # elements worked on at once, measured: 2 MiB in fp32
_LEAST_NORMAL = 2.0**-126
_LOG_RANGE = 32.0  # octaves below a block's greatest magnitude that LogFMT can still tell from zero
_LOG2_COEFFICIENTS: list[float] = (
    np.polynomial.Chebyshev.interpolate(np.log2, deg=6, domain=[1, 2])
    .convert(kind=np.polynomial.Polynomial)
    .coef.tolist()
)


class Codec(Protocol):
    """x_RH [R, H] of any float dtype up to 32 bits to rows [R, row_bytes] of uint8, and back."""

    @property
    def name(self) -> str: ...

    def row_bytes(self, hidden: int, dtype: torch.dtype) -> int:
        """Bytes of one row, a multiple of 4."""

    def encode(self, x_RH: Tensor) -> Tensor:
        """Rows that may share memory with x."""

    def decode(self, rows: Tensor, hidden: int, dtype: torch.dtype) -> Tensor:
        """x_RH in `dtype`, the dtype that was encoded. Rows may be columns of wider ones."""


@dataclass(frozen=True)
class Plain:
    """The model's own dtype, whichever it is: every bit survives, those of NaN and Inf too."""

    name: str = "bfloat16"

    def row_bytes(self, hidden: int, dtype: torch.dtype) -> int:
        return aligned(hidden * dtype.itemsize, 4)

    def encode(self, x_RH: Tensor) -> Tensor:
        num_rows, hidden = x_RH.shape
        rows = as_bytes(x_RH).view(num_rows, hidden * x_RH.element_size())
        spare = self.row_bytes(hidden, x_RH.dtype) - rows.shape[1]
        return torch.nn.functional.pad(rows, (0, spare)) if spare else rows

    def decode(self, rows: Tensor, hidden: int, dtype: torch.dtype) -> Tensor:
        return elements(rows[:, : hidden * dtype.itemsize], dtype)


@dataclass(frozen=True)
class Float8:
    """e4m3 with a scale per block: the cast of DeepSeek-V3 (arXiv:2412.19437, section 3.3).

    fp32 scales: max(amax, 1e-4) / 448, and q = e4m3(x / scale). Power-of-two scales: the next power
    of two from amax / 448 up, stored as its exponent byte (UE8M0), with no floor but the least
    normal number. A refused block has the scale Inf, exponent byte 255 (NaN in UE8M0).
    Row: H bytes padded to 4, then the scales, padded to 4.
    """

    name: str
    power_of_two: bool

    def row_bytes(self, hidden: int, dtype: torch.dtype) -> int:
        return aligned(hidden, 4) + aligned(num_blocks(hidden) * (1 if self.power_of_two else 4), 4)

    def encode(self, x_RH: Tensor) -> Tensor:
        num_rows, hidden = x_RH.shape
        rows = torch.empty((num_rows, self.row_bytes(hidden, x_RH.dtype)), dtype=torch.uint8)
        first = aligned(hidden, 4)
        for tile, y_RBC in _blocks(x_RH, BLOCK):
            out, amax_RB = rows[tile], _amax(y_RBC)
            refused_RB = ~amax_RB.isfinite()
            scales_RB = self._scales(amax_RB).masked_fill_(refused_RB, math.inf)
            if refused_RB.any():
                y_RBC.masked_fill_(refused_RB[:, :, None], 0.0)  # 0 * Inf = NaN
            if self.power_of_two:
                exponents_RB = (scales_RB.view(torch.int32) >> 23).to(torch.uint8)
                _fill(out[:, first:], exponents_RB)
            else:
                _fill(out[:, first:], _bytes_of(scales_RB))
            y_RBC.div_(scales_RB[:, :, None]).clamp_(-FP8_MAX, FP8_MAX)
            q_RH = y_RBC.flatten(1)[:, :hidden].to(torch.float8_e4m3fn)
            _fill(out[:, :first], q_RH.view(torch.uint8))
        return rows

    def decode(self, rows: Tensor, hidden: int, dtype: torch.dtype) -> Tensor:
        x_RH = torch.empty((rows.shape[0], hidden), dtype=dtype)
        first, blocks = aligned(hidden, 4), num_blocks(hidden)
        for tile in _tiles(rows.shape[0], hidden):
            part = rows[tile]
            if self.power_of_two:
                exponents_RB = part[:, first : first + blocks].to(torch.int32)
                scales_RB = (exponents_RB << 23).view(torch.float32)
            else:
                scales_RB = elements(part[:, first : first + 4 * blocks], torch.float32)
            q_RH = _float8_values(part[:, :hidden])
            x_RH[tile] = _scaled(q_RH, scales_RB, BLOCK, FP8_MAX, dtype)
        return x_RH

    def _scales(self, amax_RB: Tensor) -> Tensor:
        if not self.power_of_two:
            return amax_RB.clamp(min=MIN_AMAX) / FP8_MAX
        wanted_RB = (amax_RB / FP8_MAX).clamp(min=_LEAST_NORMAL)
        return ((wanted_RB.view(torch.int32) + 0x7FFFFF) & 0x7F800000).view(torch.float32)


@dataclass(frozen=True)
class BlockIntegers:
    """q = round(x / scale) in `bits` bits, scale = amax / (2^(bits-1) - 1) of each block.

    The step is the same for all channels of a block, so the error of a block is scale / sqrt(12) rms
    for values that fall anywhere between two steps: relative to the block's rms at most

        sqrt(block) / (2^(bits-1) - 1) / sqrt(12)            since amax <= sqrt(block) * rms

    which is 0.0257 for int8, FP8's error on any data; normal data has amax = 2.7 rms and comes out
    at a quarter of it. (The very worst block, every value in the middle between two steps, has
    sqrt(3) times this, 0.045; FP8's worst is 0.0625.)

    Scales are stored with 8 exponent and 8 fraction bits (the upper half of an fp32 without its
    sign), rounded up; 0xFFFF is NaN. Row: the scales, then the integers (`comms/bits.py`).
    """

    name: str
    bits: int
    block: int = BLOCK

    @property
    def greatest(self) -> int:
        return (1 << (self.bits - 1)) - 1

    def row_bytes(self, hidden: int, dtype: torch.dtype) -> int:
        return aligned(self._scale_bytes(hidden) + packed_bytes(hidden, self.bits), 4)

    def encode(self, x_RH: Tensor) -> Tensor:
        num_rows, hidden = x_RH.shape
        rows = torch.empty((num_rows, self.row_bytes(hidden, x_RH.dtype)), dtype=torch.uint8)
        first = self._scale_bytes(hidden)
        for tile, y_RBC in _blocks(x_RH, self.block):
            wanted_RB = (_amax(y_RBC) / self.greatest).clamp(min=_LEAST_NORMAL)
            refused_RB = ~wanted_RB.isfinite()
            codes_RB = (wanted_RB.view(torch.int32) + 0x7FFF) >> 15
            scales_RB = (codes_RB << 15).view(torch.float32)
            if refused_RB.any():
                codes_RB.masked_fill_(refused_RB, 0xFFFF)
                y_RBC.masked_fill_(refused_RB[:, :, None], 0.0)
                scales_RB.masked_fill_(refused_RB, 1.0)
            _fill(rows[tile, :first], _bytes_of(codes_RB.to(torch.int16)))
            y_RBC.mul_(1.0 / scales_RB[:, :, None]).round_()
            q_RH = y_RBC.flatten(1)[:, :hidden].to(torch.int16)
            pack_bits(q_RH.add_(self.greatest + 1), self.bits, rows[tile, first:])
        return rows

    def decode(self, rows: Tensor, hidden: int, dtype: torch.dtype) -> Tensor:
        x_RH = torch.empty((rows.shape[0], hidden), dtype=dtype)
        first = self._scale_bytes(hidden)
        for tile in _tiles(rows.shape[0], hidden):
            codes_RB = elements(rows[tile, :first], torch.int16).to(torch.int32) & 0xFFFF
            scales_RB = (codes_RB << 15).view(torch.float32)
            q_RH = unpack_bits(rows[tile, first:], hidden, self.bits).sub_(self.greatest + 1)
            x_RH[tile] = _scaled(q_RH.float(), scales_RB, self.block, float(self.greatest), dtype)
        return x_RH

    def _scale_bytes(self, hidden: int) -> int:
        return 2 * num_blocks(hidden, self.block)


@dataclass(frozen=True)
class LogFormat:
    """LogFMT-10 (DeepSeek-V3's insights paper, arXiv:2505.09343, section 3.2): sign and 9 bits.

    Code 0 is zero, codes 1..511 are magnitudes at equal steps of log2 from the block's least
    non-zero magnitude to its greatest, at most 32 octaves below it (what is smaller is zero). A
    magnitude goes to the nearer of its neighbours in linear terms. Least and greatest are stored
    as bfloat16, rounded outwards; NaN as the greatest refuses the block. No block is too large.
    """

    name: str = "logfmt10"

    def row_bytes(self, hidden: int, dtype: torch.dtype) -> int:
        return aligned(4 * num_blocks(hidden) + packed_bytes(hidden, 10), 4)

    def encode(self, x_RH: Tensor) -> Tensor:
        num_rows, hidden = x_RH.shape
        rows = torch.empty((num_rows, self.row_bytes(hidden, x_RH.dtype)), dtype=torch.uint8)
        first = 4 * num_blocks(hidden)
        for tile, y_RBC in _blocks(x_RH, BLOCK):
            ends_RB2 = _least_and_greatest(y_RBC)
            _fill(rows[tile, :first], _bytes_of(ends_RB2.flatten(1)))
            low_RB, step_RB = _log_grid(ends_RB2)
            # The middle of 1 and 2^step, in steps: log2((1 + 2^s) / 2) / s up to s^3, here 4e-7.
            middle_RB = 0.5 + step_RB * (math.log(2) / 8)
            negative = y_RBC.flatten(1)[:, :hidden] < 0
            steps = _log2(y_RBC).sub_(low_RB[:, :, None]).div_(step_RB[:, :, None])
            codes = steps.sub_(middle_RB[:, :, None] - 2).nan_to_num_(0.0).clamp_(0, 511)
            q_RH = codes.flatten(1)[:, :hidden].to(torch.int16)
            pack_bits(q_RH.add_(negative, alpha=512), 10, rows[tile, first:])
        return rows

    def decode(self, rows: Tensor, hidden: int, dtype: torch.dtype) -> Tensor:
        x_RH = torch.empty((rows.shape[0], hidden), dtype=dtype)
        blocks = num_blocks(hidden)
        first = 4 * blocks
        for tile in _tiles(rows.shape[0], hidden):
            ends_RB2 = elements(rows[tile, :first], torch.bfloat16).view(-1, blocks, 2)
            low_RB, step_RB = _log_grid(ends_RB2)
            codes_RH = unpack_bits(rows[tile, first:], hidden, 10)
            y_RBC = torch.zeros((len(codes_RH), blocks, BLOCK))  # whole vectors: see _log2
            steps_RH = y_RBC.view(len(codes_RH), -1)[:, :hidden]
            steps_RH.copy_(codes_RH & 511).sub_(1)
            y_RBC.mul_(step_RB[:, :, None]).add_(low_RB[:, :, None]).exp2_()
            signs_RH = (codes_RH & 511).clamp_(max=1) * (1 - (codes_RH >> 9) * 2)
            y_RH = y_RBC.flatten(1)[:, :hidden].mul_(signs_RH)
            x_RH[tile] = _clamped(y_RH, ends_RB2[:, :, 1].float(), 1.0, dtype)
        return x_RH


CODECS: dict[str, Codec] = {
    codec.name: codec
    for codec in (
        Plain(),
        Float8("float8", power_of_two=False),
        Float8("float8_ue8m0", power_of_two=True),
        LogFormat(),
        BlockIntegers("int6", bits=6, block=64),
        BlockIntegers("int8", bits=8),
        BlockIntegers("int10", bits=10),
    )
}


def num_blocks(hidden: int, block: int = BLOCK) -> int:
    return -(-hidden // block)


def aligned(num_bytes: int, unit: int) -> int:
    return -(-num_bytes // unit) * unit


def elements(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Columns of bytes as a tensor of `dtype`, copied where they are not aligned for it."""
    flat = rows.contiguous().reshape(-1)
    if flat.data_ptr() % dtype.itemsize:
        flat = flat.clone()  # a single row stays a view into the packed row
    return flat.view(dtype).view(rows.shape[0], rows.shape[1] // dtype.itemsize)


def _tiles(num_rows: int, hidden: int) -> Iterator[slice]:
    rows = max(1, _TILE // hidden)
    for start in range(0, num_rows, rows):
        yield slice(start, min(start + rows, num_rows))


def _blocks(x_RH: Tensor, block: int) -> Iterator[tuple[slice, Tensor]]:
    """(rows, their y_RBC): fp32 scratch that the caller may spoil, zero beyond the last channel."""
    num_rows, hidden = x_RH.shape
    blocks = num_blocks(hidden, block)
    scratch: Tensor | None = None
    for tile in _tiles(num_rows, hidden):
        if scratch is None:
            scratch = torch.empty((tile.stop, blocks * block))
        y_RH = scratch[: tile.stop - tile.start]
        y_RH[:, :hidden] = x_RH[tile]
        y_RH[:, hidden:] = 0
        yield tile, y_RH.view(-1, blocks, block)


def _amax(y_RBC: Tensor) -> Tensor:
    """The greatest magnitude of each block: NaN if any is NaN. Two reductions, no temporary."""
    return torch.maximum(y_RBC.amax(dim=2), -y_RBC.amin(dim=2))


def _float8_values(bytes_RH: Tensor) -> Tensor:
    """fp32 values of e4m3 bytes (no NaN: a refused block is all zeros).

    Sign, exponent and fraction are moved to where bfloat16 has them; what is missing is the
    difference of the exponent biases, 2^(127 - 7). Five times faster than torch's conversion.
    """
    moved_RH = bytes_RH.view(torch.int8).to(torch.int16)
    moved_RH.bitwise_left_shift_(8).bitwise_right_shift_(4).bitwise_and_(-0x7810)
    return moved_RH.view(torch.bfloat16).float().mul_(2.0**120)


def _scaled(
    q_RH: Tensor, scales_RB: Tensor, block: int, greatest: float, dtype: torch.dtype
) -> Tensor:
    """q * scale, in place; NaN in refused blocks, whose q are zero and whose scale is Inf or NaN."""
    hidden, blocks = q_RH.shape[1], scales_RB.shape[1]
    full = hidden // block
    q_RH[:, : full * block].view(len(q_RH), full, block).mul_(scales_RB[:, :full, None])
    if full < blocks:
        q_RH[:, full * block :].mul_(scales_RB[:, full:])
    return _clamped(q_RH, scales_RB, greatest, dtype)


def _clamped(y_RH: Tensor, scales_RB: Tensor, greatest: float, dtype: torch.dtype) -> Tensor:
    """y in the range of `dtype`: rounding may have carried its greatest values to Inf."""
    limit = torch.finfo(dtype).max
    if (scales_RB * greatest >= limit / 2).any():
        y_RH.clamp_(-limit, limit)  # NaN stays NaN
    return y_RH


def _least_and_greatest(y_RBC: Tensor) -> Tensor:
    """bfloat16 [R, B, 2]: the magnitudes that LogFMT's codes 1 and 511 stand for.

    (0, 0) for a block of zeros (or of less than the least normal number), (0, NaN) if refused.
    """
    amax_RB = _amax(y_RBC)
    # Zeros must not count: less one, they are the greatest of all integers without a sign.
    order_RBC = (y_RBC.view(torch.int32) & 0x7FFFFFFF).sub_(1).bitwise_and_(0x7FFFFFFF)
    amin_RB = (order_RBC.amin(dim=2) + 1).view(torch.float32)
    amin_RB = torch.maximum(amin_RB, amax_RB * 2.0**-_LOG_RANGE).clamp(min=_LEAST_NORMAL)
    least_RB = amin_RB.view(torch.int32) & -0x10000
    greatest_RB = ((amax_RB.view(torch.int32) + 0xFFFF) & -0x10000).clamp(max=0x7F7F0000)
    refused_RB, empty_RB = ~amax_RB.isfinite(), amax_RB < _LEAST_NORMAL
    least_RB.masked_fill_(refused_RB | empty_RB, 0)
    greatest_RB.masked_fill_(empty_RB, 0).masked_fill_(refused_RB, 0x7FC00000)
    ends_RB2 = torch.stack([least_RB, greatest_RB], dim=2).view(torch.float32)
    return ends_RB2.to(torch.bfloat16)


def _log_grid(ends_RB2: Tensor) -> tuple[Tensor, Tensor]:
    """log2 of the least magnitude, and the step; NaN and NaN if refused."""
    ends_RB2 = ends_RB2.float()
    nan_RB = ends_RB2[:, :, 1] - ends_RB2[:, :, 1]  # 0, or NaN
    logs_RB2 = _log2(ends_RB2.clamp(min=_LEAST_NORMAL))
    step_RB = ((logs_RB2[:, :, 1] - logs_RB2[:, :, 0]) / 510).clamp(min=2.0**-20)
    return logs_RB2[:, :, 0] + nan_RB, step_RB + nan_RB


def _log2(y: Tensor) -> Tensor:
    """log2 |y| in fp32 within 1e-5, less than -126 for zero.

    Seven times faster than torch.log2, and the same bits for an element wherever it stands:
    torch's transcendental functions end a tensor with another formula than they begin it.
    """
    bits = y.view(torch.int32)
    fraction = (bits & 0x7FFFFF).bitwise_or_(0x3F800000).view(torch.float32)  # in [1, 2)
    log = torch.full_like(fraction, _LOG2_COEFFICIENTS[-1])
    for coefficient in _LOG2_COEFFICIENTS[-2::-1]:
        log.mul_(fraction).add_(coefficient)
    return log.add_((bits >> 23).bitwise_and_(0xFF).sub_(127))


def _fill(columns: Tensor, values: Tensor) -> None:
    """Bytes into the first columns, zeros into the rest."""
    columns[:, : values.shape[1]] = values
    columns[:, values.shape[1] :] = 0


def _bytes_of(x_RC: Tensor) -> Tensor:
    return as_bytes(x_RC).view(x_RC.shape[0], x_RC.shape[1] * x_RC.element_size())
