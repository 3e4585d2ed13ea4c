"""Attention over the paged KV cache: one algorithm for decode and prefill, the same bits for a token.

A program takes the query heads that share a KV head, for as many following tokens of one sequence
as fill 64 rows (16 when sequences have a token each), and walks over their keys in tiles of 64 at absolute positions with the online
softmax in fp32. Tiles add up to *parts* of PART keys, also at absolute positions; parts are merged
in order. With many tokens one program walks all parts of its tokens and merges as it goes; with few,
the same arithmetic is divided among many programs (`attention_few`). Which of the two, which other tokens are
in the step, how a prompt was cut and where its blocks lie change nothing in a token's arithmetic.

Legend: T tokens, N query heads, G KV heads, D channels of a key, V of a value, S sequences,
B blocks of a table.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from cluster.model.cuda.attention_few import join, score, weigh
from cluster.model.cuda.attention_kernels import attend
from experts.kernels.early import early

PART = 1024
"""Keys whose softmax is computed on its own. Part of the result's bits, as the tile is."""

KEYS = 64
"""Keys of a tile. Query rows of a tile may be few or many: products, sums and maxima are the same."""

_NARROW, _WIDE = (8, 3), (8, 2)
"""Warps and stages of tiles of 16 and of 64 rows."""

LOG2_E = 1.4426950408889634

_MOST_SPREAD, _MOST_SHORT = 66, 4
"""Tiles of queries up to which they are divided further, half of a GPU's multiprocessors: where sequences may
have several parts, and where they are short. There each tile is soon done by a program of its own."""

_MOST_PROGRAMS = 528
"""Of tiles of keys; with longer sequences each takes several."""

_MOST_SCORES = 2**28
"""fp32 numbers that a division may need for scores of a whole block table."""

_FEW_KEYS = 16
"""Of a program that scores, if there are few together: a key's score depends on no other."""

_CHANNELS, _WEIGH_WARPS = 64, 4
"""Of the values, for each program of a division, and its warps."""


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
    head_tile = min(64, triton.next_power_of_2(group))
    head_blocks = triton.cdiv(group, head_tile)
    programs = num_tokens * num_kv_heads * head_blocks
    most_keys = triton.cdiv(meta.block_tables_SB.shape[1] * block_size, KEYS) * KEYS
    most_spread = _MOST_SPREAD if most_keys > PART else _MOST_SHORT
    if programs <= most_spread and num_tokens * num_heads * most_keys <= _MOST_SCORES:
        _spread(q_TND, keys, values, out_TNV, meta, scale, most_keys, (head_tile, head_blocks))
        return out_TNV
    # Few tokens of each sequence: a narrow tile reads its keys at the memory's speed.
    decodes = num_tokens < 4 * len(meta.block_tables_SB)
    rows = 16 if decodes and group <= 16 else 64
    heads = min(rows, head_tile)  # of a tile, with rows // heads tokens
    tokens = rows // heads
    head_blocks = triton.cdiv(group, heads)
    blocks = num_kv_heads * head_blocks
    merges = most_keys > PART
    step = 1 if decodes else tokens  # tokens of a program
    programs = triton.cdiv(num_tokens, step)
    warps, stages = _NARROW if rows == 16 else _WIDE
    warps = warps if _padded(value_dim) > 128 else 4
    partial = sums = out_TNV
    if merges:
        shape = (programs, blocks * rows)
        partial = torch.empty(*shape, value_dim, device=q_TND.device, dtype=torch.float32)
        sums = torch.empty(*shape, 2, device=q_TND.device, dtype=torch.float32)
    first_dim = value_dim if is_latent else key_dim  # of a key: the part that is also its value
    attend[(programs, blocks)](
        q_TND, keys, values, out_TNV, partial, sums,
        meta.positions_T, meta.sequence_T, meta.block_tables_SB, meta.num_tokens,
        num_tokens, num_heads, group, scale * LOG2_E,
        meta.block_tables_SB.stride(0), keys.stride(0), values.stride(0),
        BLOCK_SIZE=block_size, HEADS=heads, HEAD_BLOCKS=head_blocks, ROWS=rows, KEYS=KEYS,
        PART=PART, STEP=step, C=first_dim, R=key_dim - first_dim, V=value_dim,
        BLOCK_C=_padded(first_dim), BLOCK_R=_padded(key_dim - first_dim), BLOCK_V=_padded(value_dim),
        LATENT=is_latent, MERGES=merges, num_warps=warps, num_stages=stages, **early(q_TND.device),
    )  # fmt: skip
    return out_TNV


def _spread(
    q_TND: Tensor,
    keys: Tensor,
    values: Tensor,
    out_TNV: Tensor,
    meta: AttentionMeta,
    scale: float,
    most_keys: int,
    head_tiles: tuple[int, int],
) -> None:
    """Few tokens: scores by tiles of keys, then values by channels, then parts if there are several."""
    num_tokens, num_heads, key_dim = q_TND.shape
    num_kv_heads, _, block_size, _ = keys.shape
    value_dim, device = out_TNV.shape[2], q_TND.device
    first_dim = value_dim if values is keys else key_dim
    tables, (heads, head_blocks) = meta.block_tables_SB, head_tiles
    blocks, parts = num_kv_heads * head_blocks, triton.cdiv(most_keys, PART)
    scores_TNX = torch.empty(num_tokens, num_heads, most_keys, device=device, dtype=torch.float32)
    narrow = num_tokens * blocks * most_keys <= _MOST_PROGRAMS * _FEW_KEYS
    keys_each = _FEW_KEYS if narrow else KEYS
    tiles = min(most_keys // keys_each, max(1, _MOST_PROGRAMS // (num_tokens * blocks)))
    sizes = {
        "BLOCK_SIZE": block_size, "HEADS": heads, "HEAD_BLOCKS": head_blocks,
        "ROWS": max(16, heads), **early(device),
    }  # fmt: skip
    rows = (meta.positions_T, meta.sequence_T, tables, meta.num_tokens)
    score[(num_tokens, blocks, tiles)](
        q_TND, keys, scores_TNX, *rows, num_heads, num_heads // num_kv_heads, scale * LOG2_E,
        tables.stride(0), keys.stride(0), most_keys,
        KEYS=keys_each, C=first_dim, R=key_dim - first_dim, BLOCK_C=_padded(first_dim),
        BLOCK_R=_padded(key_dim - first_dim), num_warps=4 if narrow else 8, num_stages=1, **sizes,
    )  # fmt: skip
    partial = sums = out_TNV
    if parts > 1:
        shape = (parts, num_tokens, num_heads)
        partial = torch.empty(*shape, value_dim, device=device, dtype=torch.float32)
        sums = torch.empty(*shape, 2, device=device, dtype=torch.float32)
    channels = min(_CHANNELS, _padded(value_dim))
    weigh[(num_tokens, blocks * triton.cdiv(value_dim, channels), parts)](
        scores_TNX, values, out_TNV, partial, sums, *rows,
        num_tokens, num_heads, num_heads // num_kv_heads,
        tables.stride(0), values.stride(0), most_keys,
        KEYS=KEYS, PART=PART, V=value_dim, ROW=values.shape[3], CHANNELS=channels,
        num_warps=_WEIGH_WARPS, num_stages=3, **sizes,
    )  # fmt: skip
    if parts > 1:
        join[(num_tokens, num_heads)](
            partial, sums, out_TNV, meta.positions_T, meta.num_tokens, num_heads,
            PART=PART, V=value_dim, BLOCK_V=_padded(value_dim), num_warps=4, **early(device),
        )  # fmt: skip


def _padded(channels: int) -> int:
    return max(16, int(triton.next_power_of_2(channels)))
