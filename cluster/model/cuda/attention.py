"""Attention over the paged KV cache: one algorithm for decode and prefill, the same bits for a token.

A program takes the query heads that share a KV head, for as many following tokens of one sequence
as fill 64 rows (16 when sequences have a token each), and walks over their keys in tiles of 64 at absolute positions with the online
softmax in fp32. Tiles add up to *parts* of PART keys, also at absolute positions; parts are merged
in order. With few tokens every part has its own program and a second kernel merges; with many, one
program walks all parts of its tokens and merges as it goes. Which of the two, which other tokens are
in the step, how a prompt was cut and where its blocks lie change nothing in a token's arithmetic.

Legend: T tokens, N query heads, G KV heads, D channels of a key, V of a value, S sequences,
B blocks of a table.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from cluster.model.cuda.attention_kernels import attend, join

PART = 1024
"""Keys whose softmax is computed on its own. Part of the result's bits, as the tile is."""

KEYS = 64
"""Keys of a tile. Query rows of a tile may be few or many: products, sums and maxima are the same."""

_NARROW, _WIDE = (8, 3), (8, 2)
"""Warps and stages of tiles of 16 and of 64 rows."""

_MOST_SPREAD = 66
"""Tiles of queries up to which parts have their own programs: half of a GPU's multiprocessors."""


@dataclass(frozen=True, kw_only=True)
class AttentionMeta:
    """What attention must know about a step; int32 or int64, on the device.

    Tokens of one sequence stand together, at positions that follow each other. `block_tables_SB` is
    padded with any block. `num_tokens` [1]: rows from there on are padding, their output is unwritten.
    """

    positions_T: Tensor
    sequence_T: Tensor
    block_tables_SB: Tensor
    num_tokens: Tensor | None = None


def paged_attention(
    q_TND: Tensor, keys: Tensor, values: Tensor, meta: AttentionMeta, scale: float, value_dim: int
) -> Tensor:
    """softmax(scale q k^T) v over each token's own and earlier keys: bf16 [T, N, V].

    The caches are bf16 [G, num_blocks, block_size, D or V] of finite numbers. If `values` is `keys`
    (MLA) a value is the first `value_dim` channels of its key. Raises ValueError for shapes that do
    not fit together.
    """
    num_tokens, num_heads, key_dim = q_TND.shape
    num_kv_heads, _, block_size, cached_dim = keys.shape
    is_latent = values is keys
    if num_heads % num_kv_heads or key_dim != cached_dim or not q_TND.is_contiguous():
        raise ValueError(
            f"queries {list(q_TND.shape)} (contiguous: {q_TND.is_contiguous()}) for keys "
            f"{list(keys.shape)}"
        )
    if not is_latent and value_dim != values.shape[3]:
        raise ValueError(f"value_dim={value_dim} for values {list(values.shape)}")
    out_TNV = q_TND.new_empty(num_tokens, num_heads, value_dim)
    if num_tokens == 0:
        return out_TNV
    group = num_heads // num_kv_heads
    # Few tokens of each sequence: a narrow tile reads its keys at the memory's speed.
    decodes = num_tokens < 4 * len(meta.block_tables_SB)
    rows = 16 if decodes and group <= 16 else 64
    heads = min(rows, triton.next_power_of_2(group))  # of a tile, with rows // heads tokens
    tokens = rows // heads
    head_blocks = triton.cdiv(group, heads)
    blocks = num_kv_heads * head_blocks
    most_parts = triton.cdiv(meta.block_tables_SB.shape[1] * block_size, PART)
    spread = most_parts > 1 and num_tokens * blocks <= _MOST_SPREAD
    step = 1 if spread or decodes else tokens  # tokens of a program
    programs = triton.cdiv(num_tokens, step)
    warps, stages = _NARROW if rows == 16 else _WIDE
    warps = warps if _padded(value_dim) > 128 else 4
    partial = sums = out_TNV
    if most_parts > 1:
        shape = (most_parts, num_tokens, num_heads) if spread else (programs, blocks * rows)
        partial = torch.empty(*shape, value_dim, device=q_TND.device, dtype=torch.float32)
        sums = torch.empty(*shape, 2, device=q_TND.device, dtype=torch.float32)
    first_dim = value_dim if is_latent else key_dim  # of a key: the part that is also its value
    attend[(programs, blocks, most_parts if spread else 1)](
        q_TND, keys, values, out_TNV, partial, sums,
        meta.positions_T, meta.sequence_T, meta.block_tables_SB, meta.num_tokens,
        num_tokens, num_heads, group, scale * 1.4426950408889634,
        meta.block_tables_SB.stride(0), keys.stride(0), values.stride(0),
        BLOCK_SIZE=block_size, HEADS=heads, HEAD_BLOCKS=head_blocks, ROWS=rows, KEYS=KEYS,
        PART=PART, STEP=step, C=first_dim, R=key_dim - first_dim, V=value_dim,
        BLOCK_C=_padded(first_dim), BLOCK_R=_padded(key_dim - first_dim), BLOCK_V=_padded(value_dim),
        LATENT=is_latent, SPREAD=spread, MERGES=most_parts > 1 and not spread,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    if spread:
        join[(num_tokens, num_heads)](
            partial, sums, out_TNV, meta.positions_T, meta.num_tokens, num_heads,
            PART=PART, V=value_dim, BLOCK_V=_padded(value_dim), num_warps=4,
        )  # fmt: skip
    return out_TNV


def _padded(channels: int) -> int:
    return max(16, int(triton.next_power_of_2(channels)))
