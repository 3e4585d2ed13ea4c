"""From a checkpoint directory to the weights of one rank: its heads, its vocabulary, its experts.

Attention and dense MLPs are sharded over the tensor-parallel group, experts over the whole world by
the placement; norms, gates, shared experts and MLA's down-projections are small and kept whole. No
tensor is read that this rank does not compute with.

Legend: H hidden, I expert intermediate, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cluster.model.attention_loader import AttentionLoader
from cluster.model.checkpoint import EVERYTHING
from cluster.model.rank_reader import Part
from cluster.model.shards import shard
from experts.float8 import halves, stacked
from experts.mlp import GatedMLP
from experts.weights import ExpertSlots, ExpertWeights
from router.gate import Gate
from router.placement import Placement


class Loader(AttentionLoader):
    """Builds this rank's modules, one layer at a time."""

    def embedding(self) -> Tensor:
        """Our rows of the vocabulary."""
        return self._read("model.embed_tokens.weight", self._vocabulary_shape, rows=self._vocab)

    def head(self, embedding: Tensor) -> Tensor:
        """Our rows of the output projection; the embedding itself when they are tied."""
        if self.config.tie_word_embeddings:
            return embedding
        return self._read("lm_head.weight", self._vocabulary_shape, rows=self._vocab)

    def dense_mlp(self, layer: int) -> GatedMLP:
        """Our channels of a dense layer's MLP: gate and up by rows, down by columns."""
        size = self.config.dense_intermediate_size
        mine = shard(size, self.topology.tensor_parallel_size, self._tp_rank)
        return self._mlp(f"model.layers.{layer}.mlp", size, mine)

    def shared_expert(self, layer: int) -> GatedMLP | None:
        size = self.config.shared_intermediate_size
        if not size:
            return None
        return self._mlp(f"model.layers.{layer}.mlp.shared_experts", size, EVERYTHING)

    def gate(self, layer: int) -> Gate:
        """Gates are kept in fp32: a near-tie between experts must not be decided by rounding."""
        name = f"model.layers.{layer}.{self._moe_prefix(layer)}.gate"
        num_experts = self.config.num_experts
        shape = (num_experts, self.config.hidden_size)
        weight = self.checkpoint.read(f"{name}.weight", shape, torch.float32)
        bias = None
        if self.config.has_correction_bias:
            key = f"{name}.e_score_correction_bias"
            bias = self.checkpoint.read(key, (num_experts,), torch.float32)
        return Gate(self.config.gate, weight, bias)

    def experts(self, moe_idx: int, placement: Placement) -> ExpertSlots:
        """The experts that the placement puts into our slots of this expert layer."""
        layer = self.config.moe_layers[moe_idx]
        hidden, size = self.config.hidden_size, self.config.expert_intermediate_size
        slots = ExpertSlots(placement.slots_per_rank, hidden, size, self.dtype)
        for slot, expert in placement.experts_of_rank(moe_idx, self.rank).items():
            slots.load(slot, *self._expert(layer, expert))
        return slots

    def expert(self, moe_idx: int, expert: int) -> GatedMLP:
        """One expert of this expert layer, where the checkpoint reads to."""
        gate, up, down = self._expert(self.config.moe_layers[moe_idx], expert)
        return GatedMLP(stacked([gate, up]), down)

    def fill(self, weights: ExpertWeights, moe_idx: int, expert: int) -> None:
        """One expert into memory on the host, in the form that this memory is for."""
        weights.fill(*self._expert(self.config.moe_layers[moe_idx], expert))

    @property
    def float8_experts(self) -> bool:
        """Whether `expert` gives e4m3."""
        return self.keep_float8 and self.config.float8

    def _expert(self, layer: int, expert: int) -> tuple[Tensor, Tensor, Tensor]:
        """gate_IH, up_IH, down_HI of one expert, stored on its own or stacked with the others."""
        hidden, size = self.config.hidden_size, self.config.expert_intermediate_size
        prefix = self._moe_prefix(layer)
        name = f"model.layers.{layer}.{prefix}.experts"
        if f"{name}.gate_up_proj" in self.checkpoint:
            return self._expert_of_stack(name, expert)
        mixtral = prefix == "block_sparse_moe"
        keys = ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")
        gate, up, down = names = [f"{name}.{expert}.{key}.weight" for key in keys]
        self.checkpoint.expect(names)
        return (
            self._matrix(Part(gate, (size, hidden))),
            self._matrix(Part(up, (size, hidden))),
            self._matrix(Part(down, (hidden, size))),
        )

    def _expert_of_stack(self, name: str, expert: int) -> tuple[Tensor, Tensor, Tensor]:
        hidden, size = self.config.hidden_size, self.config.expert_intermediate_size

        def read(key: str, rows: int, columns: int) -> Tensor:
            shape = (self.config.num_experts, rows, columns)
            return self.checkpoint.read_item(
                f"{name}.{key}", expert, shape, self.dtype, keep_float8=self.keep_float8
            )

        gate, up = halves(read("gate_up_proj", 2 * size, hidden))
        return gate, up, read("down_proj", hidden, size)

    def _moe_prefix(self, layer: int) -> str:
        """Mixtral's published checkpoints call the block differently."""
        old = f"model.layers.{layer}.block_sparse_moe.gate.weight"
        return "block_sparse_moe" if old in self.checkpoint else "mlp"

    def _mlp(self, name: str, size: int, mine: slice) -> GatedMLP:
        hidden = self.config.hidden_size
        w13 = self._matrix(
            Part(f"{name}.gate_proj.weight", (size, hidden), rows=mine),
            Part(f"{name}.up_proj.weight", (size, hidden), rows=mine),
        )
        return GatedMLP(
            w13, self._matrix(Part(f"{name}.down_proj.weight", (hidden, size), columns=mine))
        )

    @property
    def _vocab(self) -> slice:
        return shard(self.config.vocab_size, self.topology.tensor_parallel_size, self._tp_rank)

    @property
    def _vocabulary_shape(self) -> tuple[int, int]:
        return self.config.vocab_size, self.config.hidden_size
