"""From a checkpoint directory to the weights of one rank: its heads, its vocabulary, its experts.

Attention and dense MLPs are sharded over the tensor-parallel group, experts over the whole world by
the placement; norms, gates, shared experts and MLA's down-projections are small and kept whole. No
tensor is read that this rank does not compute with.

Legend: H hidden, N heads here, D head channels, C latent channels, M un-rotated query channels,
V value channels, I expert intermediate, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cluster.model.attention import GqaAttention
from cluster.model.checkpoint import EVERYTHING, Checkpoint
from cluster.model.config import GqaConfig, MlaConfig, ModelConfig
from cluster.model.kv_cache import local_kv_heads
from cluster.model.mla import MlaAttention
from cluster.model.norm import RmsNorm
from cluster.model.shards import shard
from comms.topology import Topology
from experts.mlp import GatedMLP
from experts.weights import ExpertSlots, ExpertWeights
from router.gate import Gate
from router.placement import Placement

LATENT_NORM_EPS = 1e-6
"""DeepSeek's own value for the norms inside MLA; `rms_norm_eps` does not apply to them."""


@dataclass(frozen=True, kw_only=True)
class Loader:
    """Builds this rank's modules, one layer at a time, in `dtype`."""

    checkpoint: Checkpoint
    config: ModelConfig
    topology: Topology
    rank: int
    dtype: torch.dtype

    def __post_init__(self) -> None:
        heads, tp_size = self.config.attention.num_heads, self.topology.tensor_parallel_size
        if heads % tp_size:
            raise ValueError(
                f"tensor_parallel_size must divide num_attention_heads, got {heads} % {tp_size} = "
                f"{heads % tp_size}"
            )

    def embedding(self) -> Tensor:
        """Our rows of the vocabulary."""
        return self._read("model.embed_tokens.weight", self._vocabulary_shape, rows=self._vocab)

    def head(self, embedding: Tensor) -> Tensor:
        """Our rows of the output projection; the embedding itself when they are tied."""
        if self.config.tie_word_embeddings:
            return embedding
        return self._read("lm_head.weight", self._vocabulary_shape, rows=self._vocab)

    def norm(self, name: str, size: int | None = None, eps: float | None = None) -> RmsNorm:
        weight = self._read(f"model.{name}.weight", (size or self.config.hidden_size,))
        return RmsNorm(weight, self.config.rms_norm_eps if eps is None else eps)

    def attention(self, layer: int) -> GqaAttention | MlaAttention:
        attention = self.config.attention
        if isinstance(attention, GqaConfig):
            return self._gqa(f"layers.{layer}.self_attn", attention)
        return self._mla(f"layers.{layer}.self_attn", attention)

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

    def expert(self, moe_idx: int, expert: int) -> ExpertWeights:
        """One expert of this expert layer, as `experts` loads it."""
        hidden, size = self.config.hidden_size, self.config.expert_intermediate_size
        weights = ExpertWeights(hidden, size, self.dtype)
        weights.fill(*self._expert(self.config.moe_layers[moe_idx], expert))
        return weights

    def _expert(self, layer: int, expert: int) -> tuple[Tensor, Tensor, Tensor]:
        """gate_IH, up_IH, down_HI of one expert, stored on its own or stacked with the others."""
        hidden, size = self.config.hidden_size, self.config.expert_intermediate_size
        prefix = self._moe_prefix(layer)
        name = f"model.layers.{layer}.{prefix}.experts"
        if f"{name}.gate_up_proj" in self.checkpoint:
            num_experts = self.config.num_experts
            gate_up = self.checkpoint.read_item(
                f"{name}.gate_up_proj", expert, (num_experts, 2 * size, hidden), self.dtype
            )
            down = self.checkpoint.read_item(
                f"{name}.down_proj", expert, (num_experts, hidden, size), self.dtype
            )
            return gate_up[:size], gate_up[size:], down
        mixtral = prefix == "block_sparse_moe"
        keys = ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")
        return (
            self._read(f"{name}.{expert}.{keys[0]}.weight", (size, hidden)),
            self._read(f"{name}.{expert}.{keys[1]}.weight", (size, hidden)),
            self._read(f"{name}.{expert}.{keys[2]}.weight", (hidden, size)),
        )

    def _moe_prefix(self, layer: int) -> str:
        """Mixtral's published checkpoints call the block differently."""
        old = f"model.layers.{layer}.block_sparse_moe.gate.weight"
        return "block_sparse_moe" if old in self.checkpoint else "mlp"

    def _mlp(self, name: str, size: int, mine: slice) -> GatedMLP:
        hidden = self.config.hidden_size
        gate = self._read(f"{name}.gate_proj.weight", (size, hidden), rows=mine)
        up = self._read(f"{name}.up_proj.weight", (size, hidden), rows=mine)
        down = self._read(f"{name}.down_proj.weight", (hidden, size), columns=mine)
        return GatedMLP(torch.cat([gate, up]), down)

    def _gqa(self, name: str, config: GqaConfig) -> GqaAttention:
        hidden, dim = self.config.hidden_size, config.head_dim
        tp_size = self.topology.tensor_parallel_size
        num_kv = local_kv_heads(config.num_kv_heads, tp_size)
        first_kv = config.num_kv_heads * self._tp_rank // tp_size
        kv_rows = slice(first_kv * dim, (first_kv + num_kv) * dim)
        kv_shape = (config.num_kv_heads * dim, hidden)
        q_size = config.num_heads * dim
        heads = shard(q_size, tp_size, self._tp_rank)
        w_qkv = [
            self._read(f"model.{name}.q_proj.weight", (q_size, hidden), rows=heads),
            self._read(f"model.{name}.k_proj.weight", kv_shape, rows=kv_rows),
            self._read(f"model.{name}.v_proj.weight", kv_shape, rows=kv_rows),
        ]
        return GqaAttention(
            config=config,
            num_kv_heads=num_kv,
            w_qkv=torch.cat(w_qkv),
            w_out_HN=self._read(f"model.{name}.o_proj.weight", (hidden, q_size), columns=heads),
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
            w_query = self._read(f"model.{name}.q_a_proj.weight", (rank, hidden))
            q_norm = self.norm(f"{name}.q_a_layernorm", rank, LATENT_NORM_EPS)
            w_q_up = self._read(f"model.{name}.q_b_proj.weight", (q_size, rank), rows=q_rows)
        else:
            w_query = self._read(f"model.{name}.q_proj.weight", (q_size, hidden), rows=q_rows)
        kv_shape = (latent + config.qk_rope_head_dim, hidden)
        w_kv = self._read(f"model.{name}.kv_a_proj_with_mqa.weight", kv_shape)
        w_uk_NCM, w_uv_NVC = self._mla_up(name, config)
        o_size = config.num_heads * config.v_head_dim
        o_proj = f"model.{name}.o_proj.weight"
        return MlaAttention(
            config=config,
            w_down=torch.cat([w_query, w_kv]),
            q_norm=q_norm,
            w_q_up=w_q_up,
            latent_norm=self.norm(f"{name}.kv_a_layernorm", latent, LATENT_NORM_EPS),
            w_uk_NCM=w_uk_NCM,
            w_uv_NVC=w_uv_NVC,
            w_out_HN=self._read(o_proj, (hidden, o_size), columns=self._heads(o_size)),
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

    def _heads(self, size: int) -> slice:
        """Our part of a dimension that all heads share equally."""
        return shard(size, self.topology.tensor_parallel_size, self._tp_rank)

    def _read(
        self,
        name: str,
        shape: tuple[int, ...],
        *,
        rows: slice = EVERYTHING,
        columns: slice = EVERYTHING,
    ) -> Tensor:
        return self.checkpoint.read(name, shape, self.dtype, rows=rows, columns=columns)

    @property
    def _tp_rank(self) -> int:
        return self.topology.tp_rank_of(self.rank)

    @property
    def _vocab(self) -> slice:
        return shard(self.config.vocab_size, self.topology.tensor_parallel_size, self._tp_rank)

    @property
    def _vocabulary_shape(self) -> tuple[int, int]:
        return self.config.vocab_size, self.config.hidden_size
