"""A rank's part of weights that come whole: what `Loader` reads of a checkpoint, cut from any other source.

Legend: as in `cluster.model.loader`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cluster.model.attention import GqaAttention
from cluster.model.config import ModelConfig
from cluster.model.cuda.build import WeightSource
from cluster.model.cuda.slots import TwoMatrices
from cluster.model.kv_cache import local_kv_heads
from cluster.model.mla import MlaAttention
from cluster.model.norm import RmsNorm
from cluster.model.shards import shard
from experts.mlp import GatedMLP
from router.gate import Gate


@dataclass(frozen=True, kw_only=True)
class DividedWeights:
    """Of rank `idx` of `size`: its heads, channels of dense MLPs and words; all else is whole."""

    whole: WeightSource
    size: int
    idx: int

    @property
    def config(self) -> ModelConfig:
        return self.whole.config

    @property
    def float8_experts(self) -> bool:
        return self.whole.float8_experts

    def embedding(self) -> Tensor:
        return self._rows(self.whole.embedding())

    def head(self, embedding: Tensor) -> Tensor:
        if self.config.tie_word_embeddings:
            return embedding
        return self._rows(
            self.whole.head(embedding.new_empty(self.config.vocab_size, embedding.shape[1]))
        )

    def norm(self, name: str, size: int | None = None, eps: float | None = None) -> RmsNorm:
        return self.whole.norm(name, size, eps)

    def attention(self, layer: int) -> GqaAttention | MlaAttention:
        module = self.whole.attention(layer)
        return self._gqa(module) if isinstance(module, GqaAttention) else self._mla(module)

    def dense_mlp(self, layer: int) -> GatedMLP:
        mlp = self.whole.dense_mlp(layer)
        return GatedMLP(
            torch.cat([self._rows(half) for half in mlp.w13.chunk(2)]), self._columns(mlp.w2)
        )

    def shared_expert(self, layer: int) -> GatedMLP | None:
        return self.whole.shared_expert(layer)

    def gate(self, layer: int) -> Gate:
        return self.whole.gate(layer)

    def expert(self, moe_idx: int, expert: int) -> TwoMatrices:
        return self.whole.expert(moe_idx, expert)

    def _gqa(self, module: GqaAttention) -> GqaAttention:
        config, dim = module.config, module.config.head_dim
        num_kv = local_kv_heads(config.num_kv_heads, self.size)
        first = config.num_kv_heads * self.idx // self.size
        q, k, v = module.w_qkv.split(
            [config.num_heads * dim, *[config.num_kv_heads * dim] * 2], dim=0
        )
        mine = slice(first * dim, (first + num_kv) * dim)
        return replace(
            module,
            num_kv_heads=num_kv,
            w_qkv=torch.cat([self._rows(q), k[mine], v[mine]]),
            w_out_HN=self._columns(module.w_out_HN),
        )

    def _mla(self, module: MlaAttention) -> MlaAttention:
        c, w_down, w_q_up = module.config, module.w_down, module.w_q_up
        if w_q_up is None:
            latent = c.kv_lora_rank + c.qk_rope_head_dim
            query, rest = w_down.split([len(w_down) - latent, latent])
            w_down = torch.cat([self._rows(query), rest])
        return replace(
            module,
            w_down=w_down,
            w_q_up=None if w_q_up is None else self._rows(w_q_up),
            w_uk_NCM=self._rows(module.w_uk_NCM),
            w_uv_NVC=self._rows(module.w_uv_NVC),
            w_out_HN=self._columns(module.w_out_HN),
        )

    def _rows(self, w: Tensor) -> Tensor:
        return w[shard(len(w), self.size, self.idx)].clone()

    def _columns(self, w_OI: Tensor) -> Tensor:
        return w_OI[:, shard(w_OI.shape[1], self.size, self.idx)].contiguous()
