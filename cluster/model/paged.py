"""Attention over the paged KV cache, one query token at a time in one batched product.

Every query token is its own batch entry and walks over its keys in *tiles* of fixed size at
absolute positions, with the online softmax in fp32 (Milakov & Gimelshein 2018). Which other tokens
are in the step, how a prompt was cut into chunks and where its blocks lie change nothing in a
token's arithmetic, so they cannot change a bit of its result. Prefill and decode run the same code.

Legend: T query tokens, A those still active in a tile, G KV heads here, Q query heads per KV head,
D channels of a key, S keys of a tile, P blocks of a tile, N sequences, B blocks of a table.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from cluster.model.batch import ForwardBatch
from experts.linear import stable_bmm

KEY_TILE = 64
"""Keys of a tile, if whole blocks fit: the result does not depend on a block size that divides it."""


def blocks_per_tile(block_size: int) -> int:
    return max(1, KEY_TILE // block_size)


@dataclass(frozen=True, kw_only=True)
class KeyTile:
    """One tile of positions, for the tokens whose history reaches it.

    `tokens_A` is None when that is every token. `hidden_AS` marks keys after the query's own
    position, and is None when no token has any.
    """

    tokens_A: Tensor | None
    blocks_AP: Tensor
    hidden_AS: Tensor | None


@dataclass(frozen=True, kw_only=True)
class AttentionPlan:
    """The tiles of one step in position order; made once, used by every layer."""

    kv_slots_T: Tensor
    tiles: tuple[KeyTile, ...]

    @staticmethod
    def build(batch: ForwardBatch, block_size: int) -> AttentionPlan:
        if batch.num_tokens == 0:
            return AttentionPlan(kv_slots_T=batch.kv_slots_T, tiles=())
        num_blocks = blocks_per_tile(block_size)
        num_keys = num_blocks * block_size
        num_tiles = int(batch.positions_T.max()) // num_keys + 1
        spare = max(0, num_tiles * num_blocks - batch.block_tables_NB.shape[1])
        tables_NB = F.pad(batch.block_tables_NB, (0, spare))
        tiles = []
        for tile_idx in range(num_tiles):
            first = tile_idx * num_keys
            tokens_A = (batch.positions_T >= first).nonzero().squeeze(1)
            everyone = len(tokens_A) == batch.num_tokens
            columns = slice(tile_idx * num_blocks, (tile_idx + 1) * num_blocks)
            key_positions_S = torch.arange(first, first + num_keys)
            hidden_AS = key_positions_S > batch.positions_T[tokens_A].unsqueeze(1)
            tile = KeyTile(
                tokens_A=None if everyone else tokens_A,
                blocks_AP=tables_NB[batch.sequence_T[tokens_A], columns],
                hidden_AS=hidden_AS if bool(hidden_AS.any()) else None,
            )
            tiles.append(tile)
        return AttentionPlan(kv_slots_T=batch.kv_slots_T, tiles=tuple(tiles))


def paged_attention(
    q_TGQD: Tensor, k_cache: Tensor, v_cache: Tensor, plan: AttentionPlan, scale: float
) -> Tensor:
    """softmax(scale * q k^T) v over each token's own and earlier keys: fp32 [T, G, Q, V].

    The caches are [G, num_blocks, block_size, D or V]; passing one tensor as both reads it once.
    Products are in fp32 whatever the cache's dtype (a product of two bf16 numbers is exact in it).
    A hidden key weighs exactly 0, and its value is replaced by 0, so that whatever an earlier owner
    left in the block, NaN included, cannot reach another sequence.
    """
    q_GTQD = (q_TGQD.float() * scale).transpose(0, 1).contiguous()
    heads, num_tokens, group, _ = q_GTQD.shape
    state = _Softmax.empty(heads, num_tokens, group, v_cache.shape[-1])
    for tile in plan.tiles:
        entering = q_GTQD if tile.tokens_A is None else q_GTQD[:, tile.tokens_A]
        k_ESD = _read_tile(k_cache, tile.blocks_AP)
        v_ESV = k_ESD if v_cache is k_cache else _read_tile(v_cache, tile.blocks_AP)
        scores_EQS = stable_bmm(entering.flatten(0, 1), k_ESD.transpose(1, 2))
        if tile.hidden_AS is not None:
            hidden_E1S = tile.hidden_AS.repeat(heads, 1).unsqueeze(1)
            scores_EQS = scores_EQS.masked_fill(hidden_E1S, -torch.inf)
            v_ESV = v_ESV.masked_fill(hidden_E1S.transpose(1, 2), 0.0)
        if tile.tokens_A is None:
            state = state.extended(scores_EQS, v_ESV)
        else:
            state.put(tile.tokens_A, state.take(tile.tokens_A).extended(scores_EQS, v_ESV))
    return (state.acc_GTQV / state.total_GTQ1).transpose(0, 1)


def _read_tile(cache: Tensor, blocks_AP: Tensor) -> Tensor:
    """The keys or values of each token's blocks, fp32 [E, S, D] with E = G * A head-major."""
    heads, _, block_size, channels = cache.shape
    num_tokens, num_blocks = blocks_AP.shape
    rows = cache.index_select(1, blocks_AP.flatten())
    return rows.view(heads * num_tokens, num_blocks * block_size, channels).float()


@dataclass(kw_only=True)
class _Softmax:
    """Running maximum, sum of exponentials and weighted values of each query head."""

    peak_GTQ1: Tensor
    total_GTQ1: Tensor
    acc_GTQV: Tensor

    @staticmethod
    def empty(heads: int, num_tokens: int, group: int, channels: int) -> _Softmax:
        shape = (heads, num_tokens, group)
        return _Softmax(
            peak_GTQ1=torch.full((*shape, 1), -torch.inf),
            total_GTQ1=torch.zeros(*shape, 1),
            acc_GTQV=torch.zeros(*shape, channels),
        )

    def extended(self, scores_EQS: Tensor, v_ESV: Tensor) -> _Softmax:
        """With one more tile. A tile always has a visible key, so the new peak is finite."""
        shape = self.peak_GTQ1.shape[:3]
        scores_GTQS = scores_EQS.view(*shape, -1)
        peak = torch.maximum(self.peak_GTQ1, scores_GTQS.amax(-1, keepdim=True))
        shrink = torch.exp(self.peak_GTQ1 - peak)
        weights = torch.exp(scores_GTQS - peak)
        values = stable_bmm(weights.flatten(0, 1), v_ESV).view(*shape, -1)
        return _Softmax(
            peak_GTQ1=peak,
            total_GTQ1=self.total_GTQ1 * shrink + weights.sum(-1, keepdim=True),
            acc_GTQV=self.acc_GTQV * shrink + values,
        )

    def take(self, tokens_A: Tensor) -> _Softmax:
        return _Softmax(**{name: x[:, tokens_A] for name, x in vars(self).items()})

    def put(self, tokens_A: Tensor, part: _Softmax) -> None:
        for name, x in vars(self).items():
            x[:, tokens_A] = getattr(part, name)
