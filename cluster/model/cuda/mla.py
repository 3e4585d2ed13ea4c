"""Multi-head latent attention on a GPU, in the absorbed form of `cluster.model.mla`: this rank's heads.

Legend: T rows, H hidden, N heads, C latent channels, R rotary channels, D = C + R, M channels of a
head's un-rotated query, V of its value, Q channels of the query's down-projection.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from cluster.model.config import MlaConfig
from cluster.model.cuda.ops import Ops, Step
from cluster.model.cuda.weights import Matrix, Norm
from cluster.model.kv_cache import LayerCache
from cluster.model.norm import RmsNorm
from experts.kernels.types import NormedRows
from experts.second_stream import Aside

STORED_ASIDE = 256
"""Rows up to which storing them and their query's product run at once."""


@dataclass(frozen=True, kw_only=True)
class CudaMla:
    """Weights as in `MlaAttention`; the maps between latent and heads stay in bfloat16."""

    config: MlaConfig
    w_down: Matrix
    q_norm: Norm | None
    w_q_up: Matrix | None
    latent_norm: RmsNorm
    w_uk_NCM: Tensor
    w_uv_NVC: Tensor
    w_out: Matrix
    ops: Ops

    @property
    def reads_float8(self) -> bool:
        return self.w_down.is_float8

    def __call__(self, rows: NormedRows, step: Step, cache: LayerCache) -> Tensor:
        c, ops = self.config, self.ops
        latent = c.kv_lora_rank
        down = ops.linear(rows, self.w_down)
        query_TQ = down[:, : down.shape[1] - latent - c.qk_rope_head_dim]
        latent_TD = down[:, query_TQ.shape[1] :]
        if self.q_norm is not None and self.w_q_up is not None:
            query_TQ = ops.linear(ops.rms_norm(query_TQ, self.q_norm), self.w_q_up)
        query_TNX = query_TQ.unflatten(1, (len(self.w_uk_NCM), -1))
        nope = c.qk_nope_head_dim
        q_TND = down.new_empty(len(down), len(self.w_uk_NCM), latent + c.qk_rope_head_dim)
        aside = Aside(down.device, on=len(down) <= STORED_ASIDE)
        with aside:
            ops.store_latents(latent_TD, query_TNX, self.latent_norm, step, cache, q_TND)
        ops.linears(query_TNX[..., :nope], self.w_uk_NCM, out_TNO=q_TND[..., :latent])
        aside.join()
        out_TNC = ops.attention(q_TND, cache, step.plan, c.softmax_scale, latent)
        return ops.linear(ops.linears(out_TNC, self.w_uv_NVC).flatten(1), self.w_out)
