"""Finds, on the machine at hand, the matrix shapes whose kernels give a row the same bits.

A floating-point sum depends on its order, and BLAS libraries pick the order by shape: the same row
of `x @ w.T` differs between one row and many, between a small and a large product, sometimes
between aligned and unaligned operands. No library documents where it switches, so this module
measures it once per shape. It multiplies *cancelling* operands: every exact result is zero, so a
computed element is nothing but the rounding error of its own summation order, and two kernels
agree on all of them only if they add in the same order. (Plain random data hides such differences
in BF16: rounding the output swallows nearly all of them.)

T rows, I in-features, O out-features, B batch entries, M rows of an entry, D contracted, N columns.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

CANDIDATE_TILES = (8, 16, 24, 32, 48, 64, 128, 256)
"""Row counts a product may run with. 8 is the base; the others join where they equal it."""

_MAX_PROBED_OUT_FEATURES = 8192  # beyond it kernels differ by O's remainder only, if at all


def cancelling_operands(
    rows: int, columns: int, features: int, dtype: torch.dtype, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Operands `a [rows, features]` and `b [columns, features]` with `a @ b.T` exactly zero.

    Each product appears once with either sign, at unrelated positions. An odd `features` leaves a
    zero column. Columns beyond 251 repeat.
    """
    generator = torch.Generator().manual_seed(seed)
    half = features // 2
    order = torch.randperm(half, generator=generator)
    a = torch.randn(rows, half, generator=generator)
    b = torch.randn(min(columns, 251), half, generator=generator)
    spare_a, spare_b = (t.new_zeros(t.shape[0], features - 2 * half) for t in (a, b))
    a = torch.cat([a, -a[:, order], spare_a], dim=1).to(dtype)
    b = torch.cat([b, b[:, order], spare_b], dim=1).to(dtype)
    return a, b[torch.arange(columns) % len(b)]


@cache
def stable_tiles(
    dtype: torch.dtype,
    device: torch.device,
    in_features: int,
    out_features: int,
    has_bias: bool,
    num_threads: int,
) -> tuple[int, ...]:
    """Row counts, ascending, at which `F.linear` gives a row the same bits at every position.

    `(1,)` when even a fixed count of 8 rows depends on the position: one row a call is the same
    call every time, slow and beyond doubt.
    """
    out_features = min(out_features, _MAX_PROBED_OUT_FEATURES + out_features % 64)
    operands = cancelling_operands(max(CANDIDATE_TILES), out_features, in_features, dtype)
    x_TI, w_OI = (t.to(device) for t in operands)
    bias_O = torch.zeros(out_features, dtype=dtype, device=device) if has_bias else None

    def by_tiles(x_TI: Tensor, tile: int) -> Tensor:
        return torch.cat([F.linear(part, w_OI, bias_O) for part in torch.split(x_TI, tile)])

    base = CANDIDATE_TILES[0]
    expected_TO = by_tiles(x_TI, base)
    for shift in range(1, base):
        rolled = by_tiles(x_TI[:base].roll(shift, dims=0), base)
        if not torch.equal(rolled.roll(-shift, dims=0), expected_TO[:base]):
            return (1,)
    usable = [base]
    for tile in CANDIDATE_TILES[1:]:
        rows = len(x_TI) // tile * tile
        if torch.equal(by_tiles(x_TI[:rows], tile), expected_TO[:rows]):
            usable.append(tile)
    return tuple(usable)


@cache
def bmm_is_stable(
    dtype: torch.dtype,
    device: torch.device,
    rows: int,
    features: int,
    columns: int,
    transposed: bool,
    num_threads: int,
) -> bool:
    """Whether an entry of `torch.bmm` keeps its bits at every batch count and place in the batch.

    `transposed`: the second operand is a `[B, columns, features]` tensor seen through a transpose.
    """
    num_entries = 12
    a, b = cancelling_operands(num_entries * rows, num_entries * columns, features, dtype)
    a_BMD = a.view(num_entries, rows, features).to(device)
    b_BDN = b.view(num_entries, columns, features).to(device).transpose(1, 2)
    if not transposed:
        b_BDN = b_BDN.contiguous()
    whole = torch.bmm(a_BMD, b_BDN)
    return all(
        torch.equal(
            torch.cat([torch.bmm(a_BMD[i : i + n], b_BDN[i : i + n]) for i in range(0, 12, n)]),
            whole,
        )
        for n in (1, 2, 3, 5)
    )


@cache
def product_tiles(
    dtype: torch.dtype,
    device: torch.device,
    in_features: int,
    out_features: int,
    num_threads: int,
) -> tuple[int, ...]:
    """Row counts, ascending, at which each entry of `torch.bmm(x, w.mT)` has the bits of `F.linear`
    in tiles of 8 rows, however many entries there are. None: `bmm` cannot stand in for it."""
    base = CANDIDATE_TILES[0]
    if base not in stable_tiles(dtype, device, in_features, out_features, False, num_threads):
        return ()
    num_rows = max(CANDIDATE_TILES)
    operands = cancelling_operands(num_rows, out_features, in_features, dtype)
    x_TI, w_OI = (t.to(device) for t in operands)
    expected_TO = torch.cat([F.linear(part, w_OI) for part in torch.split(x_TI, base)])

    def by_entries(tile: int, num_entries: int) -> Tensor:
        x_BMI = x_TI[: num_rows // tile * tile].view(-1, tile, in_features)
        parts = torch.split(x_BMI, num_entries)
        w_BOI = w_OI.expand(num_entries, -1, -1).contiguous()
        return torch.cat([torch.bmm(part, w_BOI[: len(part)].mT) for part in parts]).flatten(0, 1)

    return tuple(
        tile
        for tile in CANDIDATE_TILES
        if all(
            torch.equal(rows_TO, expected_TO[: len(rows_TO)])
            for rows_TO in (by_entries(tile, n) for n in (1, 2, 3, 5, 32))
        )
    )
