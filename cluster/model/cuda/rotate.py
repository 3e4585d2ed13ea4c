# ruff: noqa: ANN001, ANN202  (what Triton compiles has no Python types)
"""Rotation, the norms before it, and the write to the paged cache: one launch a layer.

A program takes the key or the queries of one token. Values round where the CPU layer rounds them (`cluster/model/mla.py`,
`attention.py`, `rope.py`, `kv_cache.py`): norms and rotations in fp32 and cast once each; what is
cached is finite.

Legend: T tokens, N query heads, G KV heads, C latent channels, R rotary channels, F = R / 2, D
channels of a head, M un-rotated ones of a query, L positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from cluster.model.rope import RotaryTable
from experts.kernels.early import early, let_next_start, wait_for_inputs


@dataclass(frozen=True, kw_only=True)
class RopeTable:
    """cos and sin of each position on the device, fp32 [L, F]; `interleaved`: pairs are (2i, 2i + 1)."""

    cos_LF: Tensor
    sin_LF: Tensor
    interleaved: bool

    @staticmethod
    def of(table: RotaryTable, num_positions: int, device: torch.device) -> RopeTable:
        rotation = table.at(torch.arange(num_positions))
        return RopeTable(
            cos_LF=rotation.cos_TF.to(device),
            sin_LF=rotation.sin_TF.to(device),
            interleaved=rotation.interleaved,
        )


def mla_write(
    query_TNE: Tensor,
    latent_TX: Tensor,
    gain_C: Tensor,
    eps: float,
    table: RopeTable,
    positions_T: Tensor,
    kv_slots_T: Tensor,
    cache: Tensor,
    q_TND: Tensor,
) -> None:
    """Cache [norm(latent), rotated key] of each token; rotate the queries into q_TND[..., C:].

    query_TNE [T, N, M + R] and latent_TX [T, C + R] may be slices of the down projection; cache
    [1, num_blocks, block_size, C + R]; q_TND [T, N, C + R], whose first C channels are not touched.
    """
    num_tokens, num_heads, query_dim = query_TNE.shape
    latent, rotary = len(gain_C), 2 * table.cos_LF.shape[1]
    if latent_TX.shape[1] != latent + rotary or cache.shape[3] != latent + rotary:
        raise ValueError(
            f"latent rows {list(latent_TX.shape)} and cache {list(cache.shape)} for {latent} latent "
            f"and {rotary} rotary channels"
        )
    if num_tokens:
        _mla_write[(num_tokens, 2)](
            query_TNE, latent_TX, gain_C, table.cos_LF, table.sin_LF, positions_T, kv_slots_T,
            cache, q_TND, query_TNE.stride(0), query_TNE.stride(1), latent_TX.stride(0),
            q_TND.stride(0), q_TND.stride(1), num_heads, query_dim - rotary, eps,
            C=latent, F=rotary // 2, INTERLEAVED=table.interleaved, HEADS=_padded(num_heads),
            BLOCK_C=_padded(latent), BLOCK_F=_padded(rotary // 2), num_warps=4,
            **early(cache.device),
        )  # fmt: skip


def gqa_write(
    qkv_TX: Tensor,
    num_heads: int,
    q_gain: Tensor | None,
    k_gain: Tensor | None,
    eps: float,
    table: RopeTable,
    positions_T: Tensor,
    kv_slots_T: Tensor,
    keys: Tensor,
    values: Tensor,
) -> Tensor:
    """Cache each token's (normed,) rotated keys and its values; the rotated queries [T, N, D].

    qkv_TX [T, (N + 2G) D]: query heads, keys, values. Caches [G, num_blocks, block_size, D].
    """
    num_tokens, (num_kv_heads, _, _, dim) = len(qkv_TX), keys.shape
    if qkv_TX.shape[1] != (num_heads + 2 * num_kv_heads) * dim or not qkv_TX.is_contiguous():
        raise ValueError(
            f"rows {list(qkv_TX.shape)} for {num_heads} query and {num_kv_heads} KV heads of {dim}"
        )
    q_TND = qkv_TX.new_empty(num_tokens, num_heads, dim)
    if num_tokens:
        _gqa_write[(num_tokens, num_heads + 2 * num_kv_heads)](
            qkv_TX, q_gain, k_gain, table.cos_LF, table.sin_LF, positions_T, kv_slots_T,
            keys, values, q_TND, num_heads, num_kv_heads, keys.stride(0), eps,
            F=dim // 2, INTERLEAVED=table.interleaved, BLOCK_F=_padded(dim // 2), num_warps=1,
            **early(keys.device),
        )  # fmt: skip
    return q_TND


def _padded(number: int) -> int:
    return int(triton.next_power_of_2(number))


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _mla_write(  # type: ignore[no-untyped-def]
    query, latent, gain, cos, sin, positions, slots, cache, out,
    query_token, query_head, latent_token, out_token, out_head, num_heads, nope, eps,
    C: tl.constexpr, F: tl.constexpr, INTERLEAVED: tl.constexpr, HEADS: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_F: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(EARLY)
    let_next_start(EARLY)
    token = tl.program_id(0).to(tl.int64)
    position = tl.load(positions + token).to(tl.int64)
    if tl.program_id(1) == 1:
        n = tl.arange(0, HEADS)
        _turn(
            query + token * query_token + nope, out + token * out_token + C, n, n < num_heads,
            query_head, out_head, cos, sin, position, F, BLOCK_F, INTERLEAVED, False,
        )  # fmt: skip
        return
    c = tl.arange(0, BLOCK_C)
    row = cache + tl.load(slots + token).to(tl.int64) * (C + 2 * F)
    values = tl.load(latent + token * latent_token + c, mask=c < C, other=0.0).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(values * values, 0) / C + eps)
    normed = values * inverse * tl.load(gain + c, mask=c < C, other=0.0).to(tl.float32)
    tl.store(row + c, _finite(normed.to(cache.dtype.element_ty)), mask=c < C)
    one = tl.arange(0, 1)
    _turn(
        latent + token * latent_token + C, row + C, one, one < 1, 0, 0,
        cos, sin, position, F, BLOCK_F, INTERLEAVED, True,
    )  # fmt: skip


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _turn(  # type: ignore[no-untyped-def]
    source, target, rows, row_here, source_row, target_row, cos, sin, position,
    F: tl.constexpr, BLOCK_F: tl.constexpr, INTERLEAVED: tl.constexpr, FINITE: tl.constexpr,
):  # fmt: skip
    """Rotate rows of 2F channels; pairs side by side are read and written whole."""
    f = tl.arange(0, BLOCK_F)
    f_here = f < F
    cosine = tl.load(cos + position * F + f, mask=f_here, other=0.0)[None, :]
    sine = tl.load(sin + position * F + f, mask=f_here, other=0.0)[None, :]
    source_rows, target_rows = (
        source + rows[:, None] * source_row,
        target + rows[:, None] * target_row,
    )
    if INTERLEAVED and BLOCK_F == F:
        whole = tl.arange(0, 2 * F)[None, :]
        pairs = tl.load(source_rows + whole, mask=row_here[:, None], other=0.0).to(tl.float32)
        x, y = tl.split(tl.reshape(pairs, [rows.shape[0], F, 2]))
        turned = tl.join(x * cosine - y * sine, y * cosine + x * sine)
        turned = tl.reshape(turned, [rows.shape[0], 2 * F]).to(target.dtype.element_ty)
        if FINITE:
            turned = _finite(turned)
        tl.store(target_rows + whole, turned, mask=row_here[:, None])
    else:
        first = (2 * f if INTERLEAVED else f)[None, :]
        second = first + (1 if INTERLEAVED else F)
        here = row_here[:, None] & f_here[None, :]
        x = tl.load(source_rows + first, mask=here, other=0.0).to(tl.float32)
        y = tl.load(source_rows + second, mask=here, other=0.0).to(tl.float32)
        a = (x * cosine - y * sine).to(target.dtype.element_ty)
        b = (y * cosine + x * sine).to(target.dtype.element_ty)
        if FINITE:
            a, b = _finite(a), _finite(b)
        tl.store(target_rows + first, a, mask=here)
        tl.store(target_rows + second, b, mask=here)


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _gqa_write(  # type: ignore[no-untyped-def]
    qkv, q_gain, k_gain, cos, sin, positions, slots, keys, values, out,
    num_heads, num_kv_heads, cache_head, eps,
    F: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK_F: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(EARLY)
    let_next_start(EARLY)
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    f = tl.arange(0, BLOCK_F)
    here = f < F
    first = 2 * f if INTERLEAVED else f
    second = first + (1 if INTERLEAVED else F)
    at = qkv + (token * (num_heads + 2 * num_kv_heads) + head) * 2 * F
    slot = tl.load(slots + token).to(tl.int64) * 2 * F
    if head >= num_heads + num_kv_heads:
        row = values + (head - num_heads - num_kv_heads).to(tl.int64) * cache_head + slot
        tl.store(row + first, _finite(tl.load(at + first, mask=here)), mask=here)
        tl.store(row + second, _finite(tl.load(at + second, mask=here)), mask=here)
        return
    a = tl.load(at + first, mask=here, other=0.0)
    b = tl.load(at + second, mask=here, other=0.0)
    is_query = head < num_heads
    if q_gain is not None:
        gain = q_gain if is_query else k_gain
        x, y = a.to(tl.float32), b.to(tl.float32)
        inverse = tl.rsqrt((tl.sum(x * x, 0) + tl.sum(y * y, 0)) / (2 * F) + eps)
        a_gain = tl.load(gain + first, mask=here, other=0.0).to(tl.float32)
        b_gain = tl.load(gain + second, mask=here, other=0.0).to(tl.float32)
        a, b = (x * inverse * a_gain).to(a.dtype), (y * inverse * b_gain).to(b.dtype)
    angle = tl.load(positions + token).to(tl.int64) * F + f
    cosine = tl.load(cos + angle, mask=here, other=0.0)
    sine = tl.load(sin + angle, mask=here, other=0.0)
    x, y = a.to(tl.float32), b.to(tl.float32)
    turned_x = (x * cosine - y * sine).to(out.dtype.element_ty)
    turned_y = (y * cosine + x * sine).to(out.dtype.element_ty)
    if is_query:
        row = out + (token * num_heads + head) * 2 * F
        tl.store(row + first, turned_x, mask=here)
        tl.store(row + second, turned_y, mask=here)
    else:
        row = keys + (head - num_heads).to(tl.int64) * cache_head + slot
        tl.store(row + first, _finite(turned_x), mask=here)
        tl.store(row + second, _finite(turned_y), mask=here)


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _finite(x):  # type: ignore[no-untyped-def]
    """torch.nan_to_num of bf16: NaN to 0, infinities to the greatest numbers."""
    wide = x.to(tl.float32)
    most = 3.3895313892515355e38
    wide = tl.where(wide == wide, wide, 0.0)
    return tl.minimum(tl.maximum(wide, -most), most).to(x.dtype)
