"""Matrix products whose rows do not depend on the batch they are computed in.

`stable_linear` gives a row the same bits alone, in any batch and at any position; `stable_bmm`
does so for an entry of a batched product. They cut the rows into tiles of a few fixed sizes, pad
the last one, align the operands to 64 bytes, and so run only kernels that `experts.stability`
found to add in the same order on this machine. One thread per rank is assumed
(`torch.set_num_threads(1)`): with more, a library may also split the contracted dimension.

Measured with torch 2.13 (MKL 2024.2, oneDNN 3.12) on an AMD EPYC with avx512_bf16, one thread,
271 shapes (I 16..2048, O 1..4096), cancelling operands:

- fp32 `F.linear` (MKL): M=1 differs at every shape; M = 8, 16, 32, 64, 256 agree at every shape. On
  eleven shapes and random data M=2 and 3 and the last row of an odd M differed too. An unaligned x
  matters when O <= 8, an unaligned weight when M = 1. Position in the tile mattered in the one case
  tried where I is no multiple of 16 (33x7); repetition and neighbours never did.
- bf16 `F.linear`: a native kernel gives way to oneDNN's above M*I*O = 4096, with other bits: 43
  shapes differ among M = 8..256, and M=1 differs at 113. Alignment, position and repetition never
  mattered. Plain random data shows almost none of this.
- fp32 `torch.bmm`, M in 1..16, D in 16..576, N in 16..576: an entry does not depend on the batch
  count or the other entries; M = 2 and 3 depend on the alignment of the first operand. With two
  threads M = 5 does depend on the batch count.
- around the products: fp32 `exp`, `softmax`, `rsqrt`, `sqrt` and sums or means over the last
  dimension keep a row's bits; fp32 `silu`, `sigmoid`, `exp2` and bf16 `rsqrt` do not (the last
  elements of a tensor, short of a vector, go through a scalar formula).

The property tests also pass with oneDNN held to AVX2 and AVX512_CORE, MKL to AVX2 and COMPATIBLE,
and ATen to avx2 and default kernels. AMX has not been measured; there the probe decides.

Microseconds of one call, bf16 (fp32): 256x128 M=1 16 (3), M=8 17 (9), M=64 24 (47), M=256 53 (173);
256x4096 74 (69), 99 (274), 352 (1601), 1291 (6296); 2048x1536 237 (189), 292 (1128), 1127 (5032),
4004 (17446). So a base tile of 8 costs decode little in BF16, and 256 rows in tiles of 8 would cost
2 to 10 times what they do in larger tiles: hence several sizes, proved equal before use.

T rows, I in-features, O out-features, B batch entries, M rows of an entry, D contracted, N columns.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from experts.stability import bmm_is_stable, product_tiles, stable_tiles

ROW_TILE = 8
"""Rows of the smallest tile: what a decode step of one token pays for."""

_MAX_PADDED_TILE = 64  # beyond it, padding costs more than another call
_ALIGNMENT_BYTES = 64  # one AVX-512 register or cache line; what torch's CPU allocator returns
_FEATURE_MULTIPLE = 16  # fp32 elements in it
_SMALL_BYTES = 512 << 10  # of one weight; reading a larger one takes longer than calling for it


def stable_linear(x_TI: Tensor, w_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """`x_TI @ w_OI.T + bias_O` as [T, O] in x's dtype; a row's bits depend on that row only.

    T may be 0. Keep weights contiguous and 64-byte aligned, with I a multiple of 16, or they are
    copied at every call. Raises ValueError for shapes or dtypes that do not fit together.
    """
    _check(x_TI, w_OI)
    num_rows, out_features = x_TI.shape[0], w_OI.shape[0]
    if num_rows == 0:
        return x_TI.new_empty(0, out_features)
    x_TI, w_OI = _aligned(x_TI), _aligned(w_OI)
    tiles = stable_tiles(
        x_TI.dtype,
        x_TI.device,
        x_TI.shape[1],
        out_features,
        bias_O is not None,
        torch.get_num_threads(),
    )
    outputs: list[Tensor] = []
    start = 0
    while start < num_rows:
        tile = next_tile(tiles, num_rows - start)
        part = x_TI[start : start + tile]
        if part.shape[0] < tile:
            part = F.pad(part, (0, 0, 0, tile - part.shape[0]))
        outputs.append(F.linear(part, w_OI, bias_O))
        start += tile
    y_TO = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return y_TO if start == num_rows else y_TO[:num_rows]


def stable_bmm(a_BMD: Tensor, b_BDN: Tensor) -> Tensor:
    """`torch.bmm(a, b)` as [B, M, N]; an entry's bits depend on that entry and on M, D, N only.

    `b_BDN` may be the transposed view of a [B, N, D] tensor; that layout is a different kernel, so
    keep to one of them. Operands that are unaligned, or whose D is no multiple of 16, are copied.
    """
    transposed = b_BDN.shape[1] > 1 and b_BDN.stride(1) == 1
    a_BMD = _aligned(a_BMD)
    b_BDN = _aligned(b_BDN.mT).mT if transposed else _aligned(b_BDN, feature_dim=1)
    num_entries, rows, features = a_BMD.shape
    columns = b_BDN.shape[2]
    if num_entries == 0 or bmm_is_stable(
        a_BMD.dtype, a_BMD.device, rows, features, columns, transposed, torch.get_num_threads()
    ):
        return torch.bmm(a_BMD, b_BDN)
    return torch.cat([torch.bmm(a_BMD[i : i + 1], b_BDN[i : i + 1]) for i in range(num_entries)])


def small_tiles(x: Tensor, out_features: int, in_features: int) -> tuple[int, ...]:
    """Row counts with which `torch.bmm` may multiply many small weights [O, I] at once, each entry
    with the bits of `stable_linear`; empty where that is not so, or not worth it."""
    row_bytes = in_features * x.element_size()
    if row_bytes % _ALIGNMENT_BYTES or row_bytes * out_features > _SMALL_BYTES:
        return ()
    return product_tiles(x.dtype, x.device, in_features, out_features, torch.get_num_threads())


def stable_linears(x_GTI: Tensor, w_GOI: Tensor) -> Tensor:
    """`stable_linear(x_GTI[g], w_GOI[g])` of every g as [G, T, O], the same bits in fewer calls.

    Keep the weights contiguous.
    """
    groups, num_rows, in_features = x_GTI.shape
    tiles = small_tiles(x_GTI, w_GOI.shape[1], in_features)
    if not tiles or num_rows == 0:
        return torch.stack([stable_linear(x_GTI[g], w_GOI[g]) for g in range(groups)])
    outputs: list[Tensor] = []
    start = 0
    while start < num_rows:
        tile = next_tile(tiles, num_rows - start)
        part = x_GTI[:, start : start + tile]
        if part.shape[1] < tile:
            part = F.pad(part, (0, 0, 0, tile - part.shape[1]))
        outputs.append(torch.bmm(part.contiguous(), w_GOI.mT))
        start += tile
    y_GTO = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
    return y_GTO if start == num_rows else y_GTO[:, :num_rows]


def next_tile(tiles: tuple[int, ...], num_rows: int) -> int:
    """The tile that the next of `num_rows` rows go into: one padded tile if that is cheap, else
    the largest full one."""
    padded = [t for t in tiles if num_rows <= t <= _MAX_PADDED_TILE]
    return min(padded) if padded else max(t for t in tiles if t <= num_rows)


def _aligned(x: Tensor, feature_dim: int = -1) -> Tensor:
    """x itself, or a contiguous aligned copy whose features are padded with zeros to 16s."""
    spare = -x.shape[feature_dim] % _FEATURE_MULTIPLE
    if spare:
        return F.pad(x, (0, 0, 0, spare) if feature_dim == 1 and x.dim() == 3 else (0, spare))
    if x.is_contiguous() and x.data_ptr() % _ALIGNMENT_BYTES == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _check(x_TI: Tensor, w_OI: Tensor) -> None:
    if x_TI.dim() != 2 or w_OI.dim() != 2 or x_TI.shape[1] != w_OI.shape[1]:
        raise ValueError(
            f"stable_linear needs x [T, I] and w [O, I]; got x {list(x_TI.shape)} and "
            f"w {list(w_OI.shape)}"
        )
    if x_TI.dtype != w_OI.dtype:
        raise ValueError(f"stable_linear needs one dtype; got x {x_TI.dtype} and w {w_OI.dtype}")
