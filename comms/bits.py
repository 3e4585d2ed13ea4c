"""Integers of a few bits, packed tightly: a row of them as planes of 8, 4 and 2 bits.

Legend: R rows, H integers of a row, Q bytes of a plane.

An integer is cut into planes from its lowest bits up: 10 bits are 2 + 8. A plane of w bits takes
Q = ceil(H * w / 8) bytes; byte j holds the bits of integers j, j + Q, j + 2Q, ... from its lowest
bits up. So packing a plane is shifting and adding whole columns of bytes.
"""

import torch
from torch import Tensor

WIDTHS = {6: (2, 4), 8: (8,), 10: (2, 8)}  # planes by bits of an integer, lowest first


def packed_bytes(count: int, bits: int) -> int:
    return sum(_plane_bytes(count, width) for width in WIDTHS[bits])


def pack_bits(q_RH: Tensor, bits: int, out: Tensor) -> None:
    """int16 integers in [0, 2^bits) into the first bytes of each row of `out`; the rest is zeroed."""
    count = q_RH.shape[1]
    start = shift = 0
    for width in WIDTHS[bits]:
        size = _plane_bytes(count, width)
        plane = out[:, start : start + size].view(torch.int8)
        bits_RH = (q_RH >> shift if shift else q_RH).to(torch.int8)  # keeps the lowest 8 bits
        if width == 8:
            plane.copy_(bits_RH)
        else:
            bits_RH &= 2**width - 1
            plane.copy_(bits_RH[:, :size])
            for part in range(1, 8 // width):
                piece = bits_RH[:, part * size : (part + 1) * size]
                plane[:, : piece.shape[1]] |= piece << (part * width)
        start, shift = start + size, shift + width
    out[:, start:] = 0


def unpack_bits(rows: Tensor, count: int, bits: int) -> Tensor:
    """q_RH, int16, from the first bytes of each row."""
    q_RH = torch.zeros((rows.shape[0], count), dtype=torch.int16)
    start = shift = 0
    for width in WIDTHS[bits]:
        size = _plane_bytes(count, width)
        plane = rows[:, start : start + size]
        for part in range(8 // width):
            columns_RQ = q_RH[:, part * size : (part + 1) * size]
            piece = plane[:, : columns_RQ.shape[1]]
            if width < 8:
                piece = (piece >> (part * width)).bitwise_and_(2**width - 1)
            if shift:
                columns_RQ |= piece.to(torch.int16).bitwise_left_shift_(shift)
            else:
                columns_RQ.copy_(piece)
        start, shift = start + size, shift + width
    return q_RH


def _plane_bytes(count: int, width: int) -> int:
    return -(-count * width // 8)
