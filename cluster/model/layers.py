"""One decoder layer on one rank: attention, then experts or a dense MLP.

                 own rows of the token-scattered residual stream
    attention:   norm -> gather -> local heads -> scatter-sum -> add
    experts:     norm -> gate, dispatch over the world, combine, shared expert -> add
    dense MLP:   norm -> gather -> local channels -> scatter-sum -> add

Legend: T tokens of the replica, O own rows of them, H hidden.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass

from torch import Tensor

from cluster.model.attention import GqaAttention
from cluster.model.kv_cache import LayerCache
from cluster.model.mla import MlaAttention
from cluster.model.norm import RmsNorm
from cluster.model.paged import AttentionPlan
from cluster.model.rope import Rotation
from cluster.model.shards import TokenRows
from comms.where import Where
from experts.mlp import GatedMLP
from experts.moe import MoELayer, Phase


@dataclass(frozen=True, kw_only=True)
class Step:
    """What all layers of one forward pass share. `where` is told which layer this is."""

    where: Where
    rows: TokenRows
    rotation: Rotation
    plan: AttentionPlan


@dataclass(frozen=True, kw_only=True)
class DenseLayer:
    """A gated MLP whose channels are divided over the tensor-parallel group."""

    local: GatedMLP

    def forward(self, x_OH: Tensor, rows: TokenRows) -> Tensor:
        if rows.num_tokens == 0:
            return x_OH
        return rows.scatter_sum(self.local(rows.gather(x_OH)))


@dataclass(frozen=True, kw_only=True)
class DecoderLayer:
    """`phase` is entered around attention and dense MLPs; expert layers time their own parts."""

    index: int
    attention_norm: RmsNorm
    attention: GqaAttention | MlaAttention
    mlp_norm: RmsNorm
    mlp: MoELayer | DenseLayer
    phase: Phase

    def steps(self, x_OH: Tensor, step: Step, cache: LayerCache) -> Generator[None, None, Tensor]:
        """Own rows in, own rows out. Every rank's experts take part, also with no tokens.

        Yields whenever its tokens are in flight between experts and home.
        """
        step.where.layer = self.index
        if step.rows.num_tokens:
            with self.phase("attention"):
                gathered_TH = step.rows.gather(self.attention_norm(x_OH))
                partial_TH = self.attention(gathered_TH, step.rotation, cache, step.plan)
                x_OH = x_OH + step.rows.scatter_sum(partial_TH)
        normed_OH = self.mlp_norm(x_OH)
        if isinstance(self.mlp, MoELayer):
            routed_OH = yield from self.mlp.steps(normed_OH)
            return x_OH + routed_OH
        with self.phase("dense"):
            return x_OH + self.mlp.forward(normed_OH, step.rows)
