"""Attention over the paged KV cache, one query token at a time in batched products.

Every query token is its own batch entry and sees its keys in *tiles* of fixed size at absolute
positions. Each tile has a softmax of its own, in fp32; they are merged in order (the online softmax of
Milakov & Gimelshein 2018). Which other tokens are in the step, how a prompt was cut into chunks and
where its blocks lie change nothing in a token's arithmetic, so they cannot change a bit of its
result. Prefill and decode run the same code.

Tokens of one sequence that follow each other (a chunk of a prompt) form a *span* and read each tile
once for all of them; single tokens (decode) gather their own tiles, several at once, and go together.

Legend: T query tokens, A those of a part that see some tiles, N these tiles, E = A * N entries, G KV
heads here, Q query heads per KV head, D channels of a key, V of a value, S keys of a tile, P blocks of
N tiles, B blocks of a table.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from cluster.model.batch import ForwardBatch
from experts.linear import stable_bmm
from experts.stability import bmm_is_stable

KEY_TILE = 64
"""Keys of a tile, if whole blocks fit: the result does not depend on a block size that divides it."""

MIN_SPAN = 4
"""Fewer tokens of one sequence than this are gathered like single ones."""

TILES_AT_ONCE = 64
"""Tiles, of all single tokens together, that are gathered at once: more do not fit the cache."""

_FEATURE_MULTIPLE = 16  # fp32 elements of 64 bytes: what products need to run without copies


def blocks_per_tile(block_size: int) -> int:
    return max(1, KEY_TILE // block_size)


@dataclass(frozen=True, kw_only=True)
class KeyTiles:
    """Consecutive tiles of positions, and the tokens of a part whose histories reach all of them.

    `tokens_A` indexes the part; None is everyone. `blocks_AP` has one row if the part is a span.
    `hidden_ES` marks keys after the query's own position; None if no token has any.
    """

    tokens_A: Tensor | None
    num_tiles: int
    blocks_AP: Tensor
    hidden_ES: Tensor | None


@dataclass(frozen=True, kw_only=True)
class Part:
    """Tokens that walk over their tiles together."""

    tokens_T: Tensor
    tiles: tuple[KeyTiles, ...]


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
    rows = batch.sequence_T[tokens_T[:1] if is_span else tokens_T]
    tables_TB = batch.block_tables_NB[rows].numpy()
    positions_T = batch.positions_T[tokens_T].numpy()
    last_T = positions_T // num_keys
    spare = (int(last_T.max()) + 1) * num_blocks - tables_TB.shape[1]
    if spare > 0:
        tables_TB = np.pad(tables_TB, ((0, 0), (0, spare)))
    tiles = []
    for first, end in _runs(last_T, is_span):
        tokens_A = np.flatnonzero(last_T >= first)
        blocks_TP = tables_TB[:, first * num_blocks : end * num_blocks]
        keys_S = np.arange(first * num_keys, end * num_keys)
        hidden_AS = keys_S > positions_T[tokens_A, None]
        run = KeyTiles(
            tokens_A=None if len(tokens_A) == len(tokens_T) else torch.from_numpy(tokens_A),
            num_tiles=end - first,
            blocks_AP=torch.from_numpy(blocks_TP if is_span else blocks_TP[tokens_A]),
            hidden_ES=torch.from_numpy(hidden_AS.reshape(-1, num_keys))
            if hidden_AS.any()
            else None,
        )
        tiles.append(run)
    return Part(tokens_T=tokens_T, tiles=tuple(tiles))


def _runs(last_T: NDArray[np.int64], is_span: bool) -> Iterator[tuple[int, int]]:
    """Tiles [first, end) that the same tokens see, as many as are gathered at once.

    last_T: the last tile of each token.
    """
    first = 0
    for end in np.unique(last_T) + 1:
        at_once = 1 if is_span else max(1, TILES_AT_ONCE // int((last_T >= first).sum()))
        while first < end:
            yield first, min(first + at_once, int(end))
            first = min(first + at_once, int(end))


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


def _attend(q_GTQD: Tensor, k_cache: Tensor, v_cache: Tensor, runs: tuple[KeyTiles, ...]) -> Tensor:
    """The outputs of one part, [G, T, Q, V]. All of its tokens see the first tiles."""
    whole: _Softmax | None = None
    for run in runs:
        entering = q_GTQD if run.tokens_A is None else q_GTQD[:, run.tokens_A]
        for tile in _softmax_of_tiles(entering, k_cache, v_cache, run):
            if whole is None:
                whole = tile
            elif run.tokens_A is None:
                whole = whole.merged(tile)
            else:
                whole.put(run.tokens_A, whole.take(run.tokens_A).merged(tile))
    assert whole is not None, "a part has tokens, and they see themselves"
    return whole.acc_GTQV / whole.total_GTQ1


def _softmax_of_tiles(
    q_GAQD: Tensor, k_cache: Tensor, v_cache: Tensor, run: KeyTiles
) -> Iterator[_Softmax]:
    """One for each tile of the run, in order."""
    num_tokens = q_GAQD.shape[1]
    count = num_tokens * run.num_tiles
    q_GEQD = q_GAQD if run.num_tiles == 1 else q_GAQD.repeat_interleave(run.num_tiles, dim=1)
    k_GESD = _read_tiles(k_cache, run, count)
    v_GESV = k_GESD if v_cache is k_cache else _read_tiles(v_cache, run, count)
    scores_GEQS = _product(q_GEQD, k_GESD.transpose(2, 3))
    if run.hidden_ES is not None:
        scores_GEQS = scores_GEQS.masked_fill(run.hidden_ES.unsqueeze(1), -torch.inf)
    peak_GEQ1 = scores_GEQS.amax(-1, keepdim=True)
    weights_GEQS = torch.exp(scores_GEQS - peak_GEQ1)
    parts = (
        peak_GEQ1,
        weights_GEQS.sum(-1, keepdim=True),
        _product(weights_GEQS, v_GESV)[..., : v_cache.shape[-1]],
    )
    if run.num_tiles == 1:
        yield _Softmax(*parts)
        return
    by_tile = [x.unflatten(1, (num_tokens, run.num_tiles)).unbind(2) for x in parts]
    yield from (_Softmax(*tile) for tile in zip(*by_tile, strict=True))


def _read_tiles(cache: Tensor, run: KeyTiles, count: int) -> Tensor:
    """The keys or values of each entry, fp32 [G, E, S, D], D rounded up to a multiple of 16.

    A single row of blocks serves all tokens: E is then expanded, not copied.
    """
    heads, _, block_size, _ = cache.shape
    rows = cache.index_select(1, run.blocks_AP.flatten()).float()
    num_blocks = run.blocks_AP.shape[1] // run.num_tiles
    tiles_GESD = _padded(rows).view(
        heads, run.blocks_AP.shape[0] * run.num_tiles, num_blocks * block_size, -1
    )
    return tiles_GESD.expand(-1, count, -1, -1)


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


@dataclass
class _Softmax:
    """Maximum, sum of exponentials and weighted values of each query head over some tiles."""

    peak_GTQ1: Tensor
    total_GTQ1: Tensor
    acc_GTQV: Tensor

    def merged(self, tile: _Softmax) -> _Softmax:
        """With the tile that follows. A tile always has a visible key, so peaks are finite."""
        peak = torch.maximum(self.peak_GTQ1, tile.peak_GTQ1)
        before, after = torch.exp(self.peak_GTQ1 - peak), torch.exp(tile.peak_GTQ1 - peak)
        return _Softmax(
            peak,
            self.total_GTQ1 * before + tile.total_GTQ1 * after,
            self.acc_GTQV * before + tile.acc_GTQV * after,
        )

    def take(self, tokens_A: Tensor) -> _Softmax:
        return _Softmax(*(x[:, tokens_A] for x in vars(self).values()))

    def put(self, tokens_A: Tensor, part: _Softmax) -> None:
        for name, x in vars(self).items():
            x[:, tokens_A] = getattr(part, name)
