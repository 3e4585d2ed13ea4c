"""Grouped-query attention on a GPU: this rank's heads.

Legend: T rows, H hidden, G KV heads, N query heads, D head channels.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from cluster.model.config import GqaConfig
from cluster.model.cuda.ops import Ops, Step
from cluster.model.cuda.weights import Matrix
from cluster.model.kv_cache import LayerCache
from cluster.model.norm import RmsNorm
from experts.kernels.types import NormedRows


@dataclass(frozen=True, kw_only=True)
class CudaGqa:
    """Weights as in `GqaAttention`."""

    config: GqaConfig
    num_kv_heads: int
    w_qkv: Matrix
    w_out: Matrix
    q_norm: RmsNorm | None
    k_norm: RmsNorm | None
    ops: Ops

    @property
    def reads_float8(self) -> bool:
        return self.w_qkv.is_float8

    def __call__(self, rows: NormedRows, step: Step, cache: LayerCache) -> Tensor:
        c, ops = self.config, self.ops
        qkv_TX = ops.linear(rows, self.w_qkv)
        q_TND = ops.store_heads(qkv_TX, self.q_norm, self.k_norm, self.num_kv_heads, step, cache)
        out_TND = ops.attention(q_TND, cache, step.plan, c.softmax_scale, c.head_dim)
        return ops.linear(out_TND.flatten(1), self.w_out)
