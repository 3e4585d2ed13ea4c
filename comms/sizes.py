"""Row counts, byte views and sums: the rules that every group implementation shares."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def as_bytes(x: Tensor) -> Tensor:
    """A flat uint8 view of x (of a contiguous copy when x is not contiguous)."""
    return x.contiguous().reshape(-1).view(torch.uint8)


def row_bytes(x: Tensor) -> int:
    """Bytes of one row of x, also when x has no rows."""
    num_bytes = x.element_size()
    for dim in x.shape[1:]:
        num_bytes *= dim
    return num_bytes


def empty_rows(x: Tensor, num_rows: int) -> Tensor:
    return torch.empty((num_rows, *x.shape[1:]), dtype=x.dtype)


def offsets_of(sizes: Iterable[int], unit: int = 1) -> list[int]:
    """Where each part starts, and the end: [0, s0*unit, (s0+s1)*unit, ...]."""
    offsets = [0]
    for size in sizes:
        offsets.append(offsets[-1] + size * unit)
    return offsets


def check_sizes(x: Tensor, sizes: Sequence[int], group_size: int, rows: int | None = None) -> None:
    """ValueError unless `sizes` has one count per member and x has `rows` (default their sum)."""
    if len(sizes) != group_size or min(sizes) < 0:
        raise ValueError(f"expected {group_size} sizes >= 0, got {list(sizes)}")
    expected = sum(sizes) if rows is None else rows
    if x.dim() == 0 or x.shape[0] != expected:
        raise ValueError(f"expected {expected} rows (sizes {list(sizes)}), got {tuple(x.shape)}")


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp32 for floats up to 32 bits; fp64 and integers add up in themselves."""
    if dtype.is_floating_point and dtype != torch.float64:
        return torch.float32
    return dtype


def even_sizes(total: int, parts: int) -> list[int]:
    """Split `total` into contiguous parts, part i being [total*i//parts, total*(i+1)//parts)."""
    return [total * (i + 1) // parts - total * i // parts for i in range(parts)]
