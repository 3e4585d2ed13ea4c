"""One decoder layer on a GPU: the layer of `cluster.model.layers`, with norms where rows are moved.

The sum of a layer's output and the residual stream is left to the next norm, which reads both anyway:

    own rows -> attention norm (adds what the last layer left), all rows -> attention, local heads ->
    sums of own rows, MLP norm (adds) -> experts or MLP

Roundings are where the CPU's layers have them: sums of the residual stream in bfloat16, norms in fp32.

Legend: T rows of the replica, O own rows, H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from cluster.model.cuda.ops import LeavesSum, Ops, Step
from cluster.model.cuda.replica import Mlp, Replica, Stream
from cluster.model.cuda.weights import Matrix, Norm
from cluster.model.kv_cache import LayerCache
from experts.kernels.types import NormedRows


class Attention(Protocol):
    """The local heads of a layer; writes the tokens' keys to the cache, and their part [T, H] out."""

    @property
    def reads_float8(self) -> bool: ...
    def __call__(self, rows: NormedRows, step: Step, cache: LayerCache) -> Tensor: ...


@dataclass(frozen=True, kw_only=True)
class DenseMlp:
    """A gated MLP that every token passes."""

    w13: Matrix
    w2: Matrix
    ops: Ops

    def forward(self, rows: NormedRows, num_tokens: Tensor | None = None) -> Tensor:
        gate_up = self.ops.linear(rows, self.w13)
        return self.ops.linear(self.ops.silu_and_multiply(gate_up), self.w2)

    @property
    def reads_float8(self) -> bool:
        return self.w13.is_float8

    @property
    def num_bytes(self) -> int:
        return self.w13.num_bytes + self.w2.num_bytes


@dataclass(frozen=True, kw_only=True)
class CudaLayer:
    """Attention, then `mlp`: experts or a dense MLP."""

    attention_norm: Norm
    attention: Attention
    mlp_norm: Norm
    mlp: Mlp
    replica: Replica

    def forward(self, stream: Stream, step: Step, cache: LayerCache) -> Stream:
        rows, x_OH = self.replica.gather(stream, self.attention_norm)
        parts_TH = self.attention(rows, step, cache)
        own_rows, x_OH = self.replica.scatter(parts_TH, x_OH, self.mlp_norm)
        if isinstance(self.mlp, LeavesSum):
            return Stream(x_OH, self.mlp.unsummed(own_rows, step.own_tokens))
        return Stream(x_OH, self.mlp.forward(own_rows, step.own_tokens))
