"""Attention over the paged KV cache, one query token at a time in batched products.

Every query token is its own batch entry and walks over its keys in *tiles* of fixed size at
absolute positions, with the online softmax in fp32 (Milakov & Gimelshein 2018). Which other tokens
are in the step, how a prompt was cut into chunks and where its blocks lie change nothing in a
token's arithmetic, so they cannot change a bit of its result. Prefill and decode run the same code.

Tokens of one sequence that follow each other (a chunk of a prompt) form a *span* and read each tile
once for all of them; single tokens (decode) gather their own tiles and go together.

Legend: T query tokens, A those of a part still active in a tile, G KV heads here, Q query heads per
KV head, D channels of a key, V of a value, S keys of a tile, P blocks of a tile, N sequences,
B blocks of a table.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from cluster.model.batch import ForwardBatch
from experts.linear import stable_bmm
from experts.stability import bmm_is_stable

KEY_TILE = 64
"""Keys of a tile, if whole blocks fit: the result does not depend on a block size that divides it."""

MIN_SPAN = 4
"""Fewer tokens of one sequence than this are gathered like single ones."""

_FEATURE_MULTIPLE = 16  # fp32 elements of 64 bytes: what products need to run without copies


def blocks_per_tile(block_size: int) -> int:
    return max(1, KEY_TILE // block_size)


@dataclass(frozen=True, kw_only=True)
class KeyTile:
    """One tile of positions, for the tokens of a part whose history reaches it.

    `tokens_A` indexes the part; None is everyone. `blocks_AP` has one row if the part is a span.
    `hidden_AS` marks keys after the query's own position; None if no token has any.
    """

    tokens_A: Tensor | None
    blocks_AP: Tensor
    hidden_AS: Tensor | None


@dataclass(frozen=True, kw_only=True)
class Part:
    """Tokens that walk over their tiles together."""

    tokens_T: Tensor
    tiles: tuple[KeyTile, ...]


@dataclass(frozen=True, kw_only=True)
class AttentionPlan:
    """The parts of one step; made once, used by every layer."""

    kv_slots_T: Tensor
    parts: tuple[Part, ...]

    @staticmethod
    def build(batch: ForwardBatch, block_size: int) -> AttentionPlan:
        parts = tuple(
            _part(batch, tokens_T, is_span, block_size) for tokens_T, is_span in _spans(batch)
        )
        return AttentionPlan(kv_slots_T=batch.kv_slots_T, parts=parts)


def _spans(batch: ForwardBatch) -> Iterator[tuple[Tensor, bool]]:
    """Token indices of each span, then of all other tokens together."""
    if batch.num_tokens == 0:
        return
    _, lengths = torch.unique_consecutive(batch.sequence_T, return_counts=True)
    runs = torch.arange(batch.num_tokens).split(lengths.tolist())
    yield from ((run, True) for run in runs if len(run) >= MIN_SPAN)
    singles = [run for run in runs if len(run) < MIN_SPAN]
    if singles:
        yield torch.cat(singles), False


def _part(batch: ForwardBatch, tokens_T: Tensor, is_span: bool, block_size: int) -> Part:
    num_blocks = blocks_per_tile(block_size)
    num_keys = num_blocks * block_size
    positions_T = batch.positions_T[tokens_T]
    num_tiles = int(positions_T.max()) // num_keys + 1
    rows = batch.sequence_T[tokens_T[:1] if is_span else tokens_T]
    tables_TB = batch.block_tables_NB[rows]
    tables_TB = F.pad(tables_TB, (0, max(0, num_tiles * num_blocks - tables_TB.shape[1])))
    tiles = []
    for tile_idx in range(num_tiles):
        first = tile_idx * num_keys
        tokens_A = (positions_T >= first).nonzero().squeeze(1)
        blocks_TP = tables_TB[:, tile_idx * num_blocks : (tile_idx + 1) * num_blocks]
        hidden_AS = torch.arange(first, first + num_keys) > positions_T[tokens_A].unsqueeze(1)
        tile = KeyTile(
            tokens_A=None if len(tokens_A) == len(tokens_T) else tokens_A,
            blocks_AP=blocks_TP if is_span else blocks_TP[tokens_A],
            hidden_AS=hidden_AS if bool(hidden_AS.any()) else None,
        )
        tiles.append(tile)
    return Part(tokens_T=tokens_T, tiles=tuple(tiles))


def paged_attention(
    q_TGQD: Tensor, k_cache: Tensor, v_cache: Tensor, plan: AttentionPlan, scale: float
) -> Tensor:
    """softmax(scale * q k^T) v over each token's own and earlier keys: fp32 [T, G, Q, V].

    The caches are [G, num_blocks, block_size, D or V] and hold finite numbers only; passing one
    tensor as both reads it once. Products are in fp32 whatever the cache's dtype (a product of two
    bf16 numbers is exact in it). A hidden key weighs exactly 0.
    """
    q_GTQD = _padded(q_TGQD.float() * scale).transpose(0, 1)
    heads, num_tokens, group, _ = q_GTQD.shape
    if len(plan.parts) == 1:  # of all tokens, in order
        tiles = plan.parts[0].tiles
        return _attend(q_GTQD.contiguous(), k_cache, v_cache, tiles).transpose(0, 1)
    out_GTQV = torch.empty(heads, num_tokens, group, v_cache.shape[-1])
    for part in plan.parts:
        part_GTQD = q_GTQD[:, part.tokens_T].contiguous()
        out_GTQV[:, part.tokens_T] = _attend(part_GTQD, k_cache, v_cache, part.tiles)
    return out_GTQV.transpose(0, 1)


def _attend(q_GTQD: Tensor, k_cache: Tensor, v_cache: Tensor, tiles: tuple[KeyTile, ...]) -> Tensor:
    """The outputs of one part, [G, T, Q, V]. All of its tokens see the first tile."""
    state: _Softmax | None = None
    for tile in tiles:
        entering = q_GTQD if tile.tokens_A is None else q_GTQD[:, tile.tokens_A]
        k_GASD = _read_tile(k_cache, tile.blocks_AP, entering.shape[1])
        v_GASV = (
            k_GASD if v_cache is k_cache else _read_tile(v_cache, tile.blocks_AP, entering.shape[1])
        )
        scores_GAQS = _product(entering, k_GASD.transpose(2, 3))
        if tile.hidden_AS is not None:
            scores_GAQS = scores_GAQS.masked_fill(tile.hidden_AS.unsqueeze(1), -torch.inf)
        if state is None:
            state = _Softmax.of_first(scores_GAQS, v_GASV, v_cache.shape[-1])
        elif tile.tokens_A is None:
            state = state.extended(scores_GAQS, v_GASV)
        else:
            state.put(tile.tokens_A, state.take(tile.tokens_A).extended(scores_GAQS, v_GASV))
    assert state is not None, "a part has tokens, and they see themselves"
    return state.acc_GTQV / state.total_GTQ1


def _read_tile(cache: Tensor, blocks_AP: Tensor, num_tokens: int) -> Tensor:
    """The keys or values of each token, fp32 [G, A, S, D], D rounded up to a multiple of 16.

    A single row of blocks serves all tokens: A is then expanded, not copied.
    """
    heads, _, block_size, _ = cache.shape
    num_rows, num_blocks = blocks_AP.shape
    rows = cache.index_select(1, blocks_AP.flatten()).float()
    rows = _padded(rows).view(heads, num_rows, num_blocks * block_size, -1)
    return rows.expand(-1, num_tokens, -1, -1)


def _padded(x: Tensor) -> Tensor:
    """With channels in multiples of 16; itself, not a copy, where they are."""
    spare = -x.shape[-1] % _FEATURE_MULTIPLE
    return F.pad(x, (0, spare)) if spare else x


def _product(a_GAMD: Tensor, b_GADN: Tensor) -> Tensor:
    """Each entry's matrix product, [G, A, M, N], with bits that depend on that entry alone.

    For a span, b is one matrix per head seen by all tokens; multiplying it in place runs the same
    kernel on the same numbers as copies of it would, `stable_bmm`'s conditions provided.
    """
    heads, num_tokens, rows, features = a_GAMD.shape
    columns, transposed = b_GADN.shape[3], b_GADN.stride(2) == 1
    is_shared = num_tokens > 1 and b_GADN.stride(1) == 0
    if (
        not is_shared
        or features % _FEATURE_MULTIPLE
        or not bmm_is_stable(
            a_GAMD.dtype,
            a_GAMD.device,
            rows,
            features,
            columns,
            transposed,
            torch.get_num_threads(),
        )
    ):
        flat = stable_bmm(a_GAMD.flatten(0, 1), b_GADN.flatten(0, 1))
        return flat.view(heads, num_tokens, rows, columns)
    products = [torch.bmm(a_GAMD[head], b_GADN[head]) for head in range(heads)]
    return products[0].unsqueeze(0) if heads == 1 else torch.stack(products)


@dataclass(kw_only=True)
class _Softmax:
    """Running maximum, sum of exponentials and weighted values of each query head."""

    peak_GTQ1: Tensor
    total_GTQ1: Tensor
    acc_GTQV: Tensor

    @staticmethod
    def of_first(scores_GTQS: Tensor, v_GTSV: Tensor, channels: int) -> _Softmax:
        peak = scores_GTQS.amax(-1, keepdim=True)
        weights = torch.exp(scores_GTQS - peak)
        return _Softmax(
            peak_GTQ1=peak,
            total_GTQ1=weights.sum(-1, keepdim=True),
            acc_GTQV=_product(weights, v_GTSV)[..., :channels],
        )

    def extended(self, scores_GTQS: Tensor, v_GTSV: Tensor) -> _Softmax:
        """With one more tile. A tile always has a visible key, so the new peak is finite."""
        peak = torch.maximum(self.peak_GTQ1, scores_GTQS.amax(-1, keepdim=True))
        shrink = torch.exp(self.peak_GTQ1 - peak)
        weights = torch.exp(scores_GTQS - peak)
        values = _product(weights, v_GTSV)[..., : self.acc_GTQV.shape[-1]]
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
