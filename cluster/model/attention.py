"""Grouped-query attention (Qwen3-MoE, Mixtral) on this rank's heads.

Legend: T tokens, H hidden, G KV heads here, Q query heads per KV head, N = G * Q, D head channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cluster.model.config import GqaConfig
from cluster.model.kv_cache import LayerCache
from cluster.model.norm import RmsNorm
from cluster.model.paged import AttentionPlan, paged_attention
from cluster.model.rope import Rotation
from experts.linear import stable_linear


@dataclass(frozen=True, kw_only=True)
class GqaAttention:
    """`w_qkv` holds the local query heads' rows, then the keys', then the values'.

    The norms, if any, act on each head of the query and of the key before the rotation.
    """

    config: GqaConfig
    num_kv_heads: int
    w_qkv: Tensor
    w_out_HN: Tensor
    q_norm: RmsNorm | None
    k_norm: RmsNorm | None

    def __call__(
        self, x_TH: Tensor, rotation: Rotation, cache: LayerCache, plan: AttentionPlan
    ) -> Tensor:
        """The local heads' share of the output, [T, H]; sum it over the tensor-parallel group."""
        dim, kv_size = self.config.head_dim, self.num_kv_heads * self.config.head_dim
        qkv = stable_linear(x_TH, self.w_qkv)
        parts = torch.split(qkv, [qkv.shape[1] - 2 * kv_size, kv_size, kv_size], dim=1)
        q_TND, k_TGD, v_TGD = (part.reshape(len(x_TH), -1, dim) for part in parts)
        if self.q_norm and self.k_norm:
            q_TND, k_TGD = self.q_norm(q_TND), self.k_norm(k_TGD)
        cache.write(plan.kv_slots_T, rotation(k_TGD), v_TGD)
        q_TGQD = rotation(q_TND).view(len(x_TH), self.num_kv_heads, -1, dim)
        out_TGQD = paged_attention(
            q_TGQD, cache.keys, cache.values, plan, self.config.softmax_scale
        )
        return stable_linear(out_TGQD.flatten(1).to(x_TH.dtype), self.w_out_HN)
