"""Random weights of any supported model, made on the device: to measure a model that nobody downloads.

Values are normal and of a size that keeps activations near one through the layers, so that tokens
spread over the experts and no product runs on zeros.

Legend: as in `cluster.model.loader`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cluster.model.attention import GqaAttention
from cluster.model.attention_loader import LATENT_NORM_EPS
from cluster.model.config import GqaConfig, MlaConfig, ModelConfig
from cluster.model.mla import MlaAttention
from cluster.model.norm import RmsNorm
from experts.mlp import GatedMLP
from router.gate import Gate


class RandomWeights:
    """The whole model, in bfloat16; what `Loader` offers, without a checkpoint. Repeatable by seed."""

    def __init__(self, config: ModelConfig, device: torch.device, seed: int = 0) -> None:
        self.config = config
        self._device = device
        self._generator = torch.Generator(device=device).manual_seed(seed)

    def embedding(self) -> Tensor:
        return self._normal(self.config.vocab_size, self.config.hidden_size, gain=1.0, fan_in=1)

    def head(self, embedding: Tensor) -> Tensor:
        return embedding if self.config.tie_word_embeddings else self._matrix(*embedding.shape)

    def norm(self, name: str, size: int | None = None, eps: float | None = None) -> RmsNorm:
        weight = 1 + self._normal(size or self.config.hidden_size, gain=0.1, fan_in=1)
        return RmsNorm(weight, self.config.rms_norm_eps if eps is None else eps)

    def dense_mlp(self, layer: int) -> GatedMLP:
        return self._mlp(self.config.dense_intermediate_size)

    def shared_expert(self, layer: int) -> GatedMLP | None:
        size = self.config.shared_intermediate_size
        return self._mlp(size) if size else None

    def expert(self, moe_idx: int, expert: int) -> GatedMLP:
        return self._mlp(self.config.expert_intermediate_size)

    @property
    def float8_experts(self) -> bool:
        return False

    def gate(self, layer: int) -> Gate:
        config = self.config
        weight_EH = self._matrix(config.num_experts, config.hidden_size).float()
        bias = None
        if config.has_correction_bias:
            bias = self._normal(config.num_experts, gain=0.05, fan_in=1).float()
        return Gate(config.gate, weight_EH, bias)

    def attention(self, layer: int) -> GqaAttention | MlaAttention:
        attention = self.config.attention
        return self._gqa(attention) if isinstance(attention, GqaConfig) else self._mla(attention)

    def _gqa(self, config: GqaConfig) -> GqaAttention:
        hidden, dim = self.config.hidden_size, config.head_dim
        return GqaAttention(
            config=config,
            num_kv_heads=config.num_kv_heads,
            w_qkv=self._matrix((config.num_heads + 2 * config.num_kv_heads) * dim, hidden),
            w_out_HN=self._matrix(hidden, config.num_heads * dim),
            q_norm=self.norm("q", dim) if config.qk_norm else None,
            k_norm=self.norm("k", dim) if config.qk_norm else None,
        )

    def _mla(self, config: MlaConfig) -> MlaAttention:
        hidden, latent, rank = self.config.hidden_size, config.kv_lora_rank, config.q_lora_rank
        heads, nope = config.num_heads, config.qk_nope_head_dim
        q_size = heads * (nope + config.qk_rope_head_dim)
        return MlaAttention(
            config=config,
            w_down=self._matrix((rank or q_size) + latent + config.qk_rope_head_dim, hidden),
            q_norm=self.norm("q", rank, LATENT_NORM_EPS) if rank else None,
            w_q_up=self._matrix(q_size, rank) if rank else None,
            latent_norm=self.norm("latent", latent, LATENT_NORM_EPS),
            w_uk_NCM=self._normal(heads, latent, nope, gain=1.0, fan_in=latent),
            w_uv_NVC=self._normal(heads, config.v_head_dim, latent, gain=1.0, fan_in=latent),
            w_out_HN=self._matrix(hidden, heads * config.v_head_dim),
        )

    def _mlp(self, size: int) -> GatedMLP:
        hidden = self.config.hidden_size
        return GatedMLP(self._matrix(2 * size, hidden), self._matrix(hidden, size))

    def _matrix(self, rows: int, columns: int) -> Tensor:
        return self._normal(rows, columns, gain=1.0, fan_in=columns)

    def _normal(self, *shape: int, gain: float, fan_in: int) -> Tensor:
        noise = torch.empty(shape, dtype=torch.bfloat16, device=self._device)
        return noise.normal_(std=gain * fan_in**-0.5, generator=self._generator)
