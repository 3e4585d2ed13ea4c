"""One decoder layer on a GPU: the layer of `cluster.model.layers` for one rank that has whole tokens.

The sum of a layer's output and the residual stream is left to the next norm, which reads both anyway:

    attention norm (adds what the last layer left) -> attention -> MLP norm (adds) -> experts or MLP

Roundings are where the CPU's layers have them: sums of the residual stream in bfloat16, norms in fp32.

Legend: T rows, H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor

from cluster.model.cuda.ops import Ops, Step
from cluster.model.cuda.weights import Matrix
from cluster.model.kv_cache import LayerCache
from cluster.model.norm import RmsNorm


class Stream(NamedTuple):
    """The residual stream: x_TH, and what is still to be added to it; None before the first layer."""

    x_TH: Tensor
    added_TH: Tensor | None = None

    def rows(self, rows_L: Tensor) -> Stream:
        """Some rows of it."""
        x_LH = self.x_TH.index_select(0, rows_L)
        return Stream(
            x_LH, None if self.added_TH is None else self.added_TH.index_select(0, rows_L)
        )

    def normed(self, norm: RmsNorm, ops: Ops) -> tuple[Tensor, Tensor]:
        """(norm of the sum, the sum)."""
        if self.added_TH is None:
            return ops.rms_norm(self.x_TH, norm.weight, norm.eps), self.x_TH
        return ops.add_rms_norm(self.added_TH, self.x_TH, norm.weight, norm.eps)


class Attention(Protocol):
    """All heads of a layer; writes the tokens' keys to the cache, and [T, H] out."""

    def __call__(self, x_TH: Tensor, step: Step, cache: LayerCache) -> Tensor: ...


class Experts(Protocol):
    """What every token goes through after attention."""

    @property
    def num_bytes(self) -> int: ...
    def forward(self, x_TH: Tensor, num_tokens: Tensor | None = None) -> Tensor: ...


@dataclass(frozen=True, kw_only=True)
class DenseMlp:
    """A gated MLP that every token passes."""

    w13: Matrix
    w2: Matrix
    ops: Ops

    def forward(self, x_TH: Tensor, num_tokens: Tensor | None = None) -> Tensor:
        gate_up = self.ops.linear(x_TH, self.w13)
        return self.ops.linear(self.ops.silu_and_multiply(gate_up), self.w2)

    @property
    def num_bytes(self) -> int:
        return self.w13.num_bytes + self.w2.num_bytes


@dataclass(frozen=True, kw_only=True)
class CudaLayer:
    """Attention, then `mlp`: experts or a dense MLP."""

    attention_norm: RmsNorm
    attention: Attention
    mlp_norm: RmsNorm
    mlp: Experts
    ops: Ops

    def forward(self, stream: Stream, step: Step, cache: LayerCache) -> Stream:
        normed_TH, x_TH = stream.normed(self.attention_norm, self.ops)
        stream = Stream(x_TH, self.attention(normed_TH, step, cache))
        normed_TH, x_TH = stream.normed(self.mlp_norm, self.ops)
        return Stream(x_TH, self.mlp.forward(normed_TH, step.inputs.num_tokens))
