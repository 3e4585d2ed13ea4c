"""Attention of one rank from a checkpoint: its heads.

MLA's down-projections are small and kept whole.

Legend: H hidden, N heads here, D head channels, C latent channels, M un-rotated query channels,
V value channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cluster.model.attention import GqaAttention
from cluster.model.config import GqaConfig, MlaConfig
from cluster.model.kv_cache import local_kv_heads
from cluster.model.mla import MlaAttention
from cluster.model.rank_reader import Part, RankReader

LATENT_NORM_EPS = 1e-6
"""DeepSeek's own value for the norms inside MLA; `rms_norm_eps` does not apply to them."""


class AttentionLoader(RankReader):
    """Of any layer."""

    def attention(self, layer: int) -> GqaAttention | MlaAttention:
        attention = self.config.attention
        if isinstance(attention, GqaConfig):
            return self._gqa(f"layers.{layer}.self_attn", attention)
        return self._mla(f"layers.{layer}.self_attn", attention)

    def _gqa(self, name: str, config: GqaConfig) -> GqaAttention:
        hidden, dim = self.config.hidden_size, config.head_dim
        tp_size = self.topology.tensor_parallel_size
        num_kv = local_kv_heads(config.num_kv_heads, tp_size)
        first_kv = config.num_kv_heads * self._tp_rank // tp_size
        kv_rows = slice(first_kv * dim, (first_kv + num_kv) * dim)
        kv_shape = (config.num_kv_heads * dim, hidden)
        q_size = config.num_heads * dim
        heads = self._heads(q_size)
        return GqaAttention(
            config=config,
            num_kv_heads=num_kv,
            w_qkv=self._matrix(
                Part(f"model.{name}.q_proj.weight", (q_size, hidden), rows=heads),
                Part(f"model.{name}.k_proj.weight", kv_shape, rows=kv_rows),
                Part(f"model.{name}.v_proj.weight", kv_shape, rows=kv_rows),
            ),
            w_out_HN=self._matrix(
                Part(f"model.{name}.o_proj.weight", (hidden, q_size), columns=heads)
            ),
            q_norm=self.norm(f"{name}.q_norm", dim) if config.qk_norm else None,
            k_norm=self.norm(f"{name}.k_norm", dim) if config.qk_norm else None,
        )

    def _mla(self, name: str, config: MlaConfig) -> MlaAttention:
        hidden, latent = self.config.hidden_size, config.kv_lora_rank
        q_size = config.num_heads * (config.qk_nope_head_dim + config.qk_rope_head_dim)
        q_rows = self._heads(q_size)
        w_q_up = q_norm = None
        if config.q_lora_rank:
            rank = config.q_lora_rank
            query = Part(f"model.{name}.q_a_proj.weight", (rank, hidden))
            q_norm = self.norm(f"{name}.q_a_layernorm", rank, LATENT_NORM_EPS)
            up = Part(f"model.{name}.q_b_proj.weight", (q_size, rank), rows=q_rows)
            w_q_up = self._matrix(up)
        else:
            query = Part(f"model.{name}.q_proj.weight", (q_size, hidden), rows=q_rows)
        kv_shape = (latent + config.qk_rope_head_dim, hidden)
        w_uk_NCM, w_uv_NVC = self._mla_up(name, config)
        o_size = config.num_heads * config.v_head_dim
        o_proj = f"model.{name}.o_proj.weight"
        return MlaAttention(
            config=config,
            w_down=self._matrix(query, Part(f"model.{name}.kv_a_proj_with_mqa.weight", kv_shape)),
            q_norm=q_norm,
            w_q_up=w_q_up,
            latent_norm=self.norm(f"{name}.kv_a_layernorm", latent, LATENT_NORM_EPS),
            w_uk_NCM=w_uk_NCM,
            w_uv_NVC=w_uv_NVC,
            w_out_HN=self._matrix(Part(o_proj, (hidden, o_size), columns=self._heads(o_size))),
        )

    def _mla_up(self, name: str, config: MlaConfig) -> tuple[Tensor, Tensor]:
        """Our heads' maps from the latent to keys (transposed, for the query) and to values."""
        per_head = config.qk_nope_head_dim + config.v_head_dim
        size = config.num_heads * per_head
        w_kv_b = self._read(
            f"model.{name}.kv_b_proj.weight", (size, config.kv_lora_rank), rows=self._heads(size)
        )
        w_uk_NMC, w_uv_NVC = torch.split(
            w_kv_b.view(-1, per_head, config.kv_lora_rank),
            [config.qk_nope_head_dim, config.v_head_dim],
            dim=1,
        )
        # A clone even where the view is contiguous (one head): it must not keep the rest alive.
        keep = torch.contiguous_format
        return w_uk_NMC.transpose(1, 2).clone(memory_format=keep), w_uv_NVC.clone(
            memory_format=keep
        )
