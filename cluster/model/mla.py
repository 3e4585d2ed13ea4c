"""Multi-head latent attention (DeepSeek-V2 and V3) on this rank's heads, in the absorbed form.

Keys and values of all heads are linear maps of one latent per token, so the cache keeps the latent
and the maps move to the query and the output: with k = W_uk c and v = W_uv c,

    q . k = (W_uk^T q) . c        sum_s p_s v_s = W_uv (sum_s p_s c_s)

Every head then attends to the same cached row [c, rotated key], in prefill and decode alike.

Legend: T tokens, H hidden, N heads here, C latent channels, R rotary channels, D = C + R,
M channels of a head's un-rotated query, V of its value.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cluster.model.config import MlaConfig
from cluster.model.kv_cache import LayerCache
from cluster.model.norm import RmsNorm
from cluster.model.paged import AttentionPlan, paged_attention
from cluster.model.rope import Rotation
from experts.linear import stable_linear, stable_linears


@dataclass(frozen=True, kw_only=True)
class MlaAttention:
    """`w_down` holds the query's down-projection (or, without q-LoRA, the local heads' whole query
    projection), then the latent's and the rotary key's. `w_q_up` is None without q-LoRA.
    """

    config: MlaConfig
    w_down: Tensor
    q_norm: RmsNorm | None
    w_q_up: Tensor | None
    latent_norm: RmsNorm
    w_uk_NCM: Tensor
    w_uv_NVC: Tensor
    w_out_HN: Tensor

    def __call__(
        self, x_TH: Tensor, rotation: Rotation, cache: LayerCache, plan: AttentionPlan
    ) -> Tensor:
        """The local heads' share of the output, [T, H]; sum it over the tensor-parallel group."""
        c = self.config
        down = stable_linear(x_TH, self.w_down)
        query_size = down.shape[1] - c.kv_lora_rank - c.qk_rope_head_dim
        query, latent_TC, k_rope_TR = torch.split(
            down, [query_size, c.kv_lora_rank, c.qk_rope_head_dim], dim=1
        )
        if self.q_norm and self.w_q_up is not None:
            query = stable_linear(self.q_norm(query), self.w_q_up)
        q_nope_TNM, q_rope_TNR = torch.split(
            query.view(len(x_TH), len(self.w_uk_NCM), -1),
            [c.qk_nope_head_dim, c.qk_rope_head_dim],
            dim=2,
        )
        rotated = rotation(torch.cat([q_rope_TNR, k_rope_TR.unsqueeze(1)], dim=1))
        q_rope_TNR, k_rope_T1R = rotated[:, :-1], rotated[:, -1:]
        latent_T1C = self.latent_norm(latent_TC).unsqueeze(1)
        cache.write(plan.kv_slots_T, torch.cat([latent_T1C, k_rope_T1R], dim=-1))
        q_TND = torch.cat([_per_head(q_nope_TNM, self.w_uk_NCM), q_rope_TNR], dim=-1)
        # The cached row is key and value at once; the rotary channels of the sum are dropped.
        out_T1ND = paged_attention(
            q_TND.unsqueeze(1), cache.keys, cache.values, plan, c.softmax_scale
        )
        out_TNC = out_T1ND[:, 0, :, : c.kv_lora_rank].to(x_TH.dtype)
        return stable_linear(_per_head(out_TNC, self.w_uv_NVC).flatten(1), self.w_out_HN)


def _per_head(x_TNI: Tensor, w_NOI: Tensor) -> Tensor:
    """Each head's own linear map: [T, N, O]."""
    return stable_linears(x_TNI.transpose(0, 1), w_NOI).transpose(0, 1)
