"""Row counts, byte views and sums: the rules that every group implementation shares."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

_SUM_BLOCK = 16 * 1024  # elements


def as_bytes(x: Tensor) -> Tensor:
    """A flat uint8 view of x (of a contiguous copy when x is not contiguous)."""
    return x.contiguous().reshape(-1).view(torch.uint8)


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Flat uint8 parts in one piece; the part itself where there is only one with bytes."""
    filled = [part for part in parts if part.shape[0]]
    if len(filled) > 1:
        return torch.cat(filled)
    return filled[0] if filled else torch.empty(0, dtype=torch.uint8)


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


def check_sizes(x: Tensor, sizes: Sequence[int], group_size: int, mine: int | None = None) -> None:
    """ValueError unless there is one count >= 0 per member and x has as many rows as they say.

    That is sizes[mine] rows, or all of them where `mine` is None.
    """
    check_counts(sizes, group_size)
    rows = sum(sizes) if mine is None else sizes[mine]
    if x.dim() == 0 or x.shape[0] != rows:
        raise ValueError(f"expected {rows} rows (sizes {list(sizes)}), got {list(x.shape)}")


def check_counts(sizes: Sequence[int], group_size: int) -> None:
    if len(sizes) != group_size or min(sizes) < 0:
        raise ValueError(f"expected {group_size} sizes >= 0, got {list(sizes)}")


def check_parts(parts: Sequence[Tensor | None], group_size: int) -> None:
    """ValueError unless there is one part per member, each flat uint8 (or None: no message)."""
    if len(parts) != group_size:
        raise ValueError(f"expected {group_size} parts, one per member, got {len(parts)}")
    for part in parts:
        if part is not None and (part.dtype != torch.uint8 or part.dim() != 1):
            raise ValueError(f"expected flat uint8 parts, got {part.dtype} {list(part.shape)}")


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp32 for floats up to 32 bits; fp64 and integers add up in themselves."""
    if dtype.is_floating_point and dtype != torch.float64:
        return torch.float32
    return dtype


def sum_in_order(out: Tensor, parts: Sequence[Tensor]) -> None:
    """out = parts[0] + parts[1] + ... in `sum_dtype`, all flat and of one dtype.

    Block by block: the sums stay in cache, and nothing large is allocated.
    """
    wide = sum_dtype(out.dtype)
    block = min(_SUM_BLOCK, out.shape[0])
    scratch = None if wide == out.dtype else torch.empty(block, dtype=wide)
    for lo in range(0, out.shape[0], _SUM_BLOCK):
        piece = out[lo : lo + _SUM_BLOCK]
        total = piece if scratch is None else scratch[: piece.shape[0]]
        total.copy_(parts[0][lo : lo + _SUM_BLOCK])
        for part in parts[1:]:
            total.add_(part[lo : lo + _SUM_BLOCK].to(wide))
        if scratch is not None:
            piece.copy_(total)


def even_sizes(total: int, parts: int) -> list[int]:
    """Split `total` into contiguous parts, part i being [total*i//parts, total*(i+1)//parts)."""
    return [total * (i + 1) // parts - total * i // parts for i in range(parts)]
