"""The production code of one layer with random weights, ready to be called: products, attention, gate,
experts.

Legend: T tokens, H hidden, N heads of this rank, C latent channels, S slots, M rows of each slot.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cluster.model.attention import GqaAttention
from cluster.model.batch import ForwardBatch
from cluster.model.config import GqaConfig, MlaConfig, ModelConfig
from cluster.model.kv_cache import KVCache, local_kv_heads
from cluster.model.mla import MlaAttention
from cluster.model.norm import RmsNorm
from cluster.model.paged import AttentionPlan
from cluster.model.rope import RotaryTable
from comms.topology import Topology
from experts.grouped import run_experts
from experts.linear import stable_linear
from experts.weights import ExpertSlots
from router.gate import Gate
from simulations.hardware.cpu_timing import Call

BLOCK_SIZE = 16
COPIES_BYTES = 64 << 20  # of weights that calls take turns over, as a model's layers do


def product(rows: int, n: int, k: int, layers: int) -> list[Call]:
    copies = max(1, min(layers, COPIES_BYTES // (2 * n * k)))
    x_TH, weights = _random(rows, k), [_random(n, k) for _ in range(copies)]
    return [lambda w=w: stable_linear(x_TH, w) for w in weights]  # type: ignore[misc]


def per_head(rows: int, heads: int, n: int, k: int, layers: int) -> list[Call]:
    """What MLA does with its maps to and from the latent: a product for each head."""
    x_TNK = _random(rows, heads, k)
    weights = [_random(heads, n, k) for _ in range(layers)]

    def call(w: Tensor) -> Tensor:
        return torch.stack([stable_linear(x_TNK[:, i], w[i]) for i in range(heads)], dim=1)

    return [lambda w=w: call(w) for w in weights]  # type: ignore[misc]


def around_attention(model: ModelConfig, rows: int) -> list[Call]:
    """The norm before attention and the sum after it."""
    norm = RmsNorm(_random(model.hidden_size), model.rms_norm_eps)
    x_TH = _random(rows, model.hidden_size)
    return [lambda: x_TH + norm(x_TH)]


def gate(model: ModelConfig, rows: int) -> list[Call]:
    """Norm, fp32 product, choice and the count of what was chosen."""
    hidden, number = model.hidden_size, model.num_experts
    bias_E = torch.zeros(number) if model.has_correction_bias else None
    choose = Gate(model.gate, torch.randn(number, hidden) * hidden**-0.5, bias_E)
    norm, x_TH = RmsNorm(_random(hidden), model.rms_norm_eps), _random(rows, hidden)

    def call() -> Tensor:
        ids_TK, _ = choose(norm(x_TH), stable_linear)
        return torch.bincount(ids_TK.flatten() + 1, minlength=number + 1)

    return [call]


def experts(model: ModelConfig, num_slots: int, rows: int, layers: int) -> list[Call]:
    """All slots with equally many rows."""
    hidden, size = model.hidden_size, model.expert_intermediate_size
    x_RH = _random(num_slots * rows, hidden)
    slots_R1 = torch.arange(num_slots).repeat(rows).unsqueeze(1)
    copies = max(1, min(layers, COPIES_BYTES // (6 * num_slots * hidden * size)))
    weights = [_expert_slots(num_slots, hidden, size) for _ in range(copies)]
    return [lambda s=s: run_experts(x_RH, slots_R1, s) for s in weights]  # type: ignore[misc]


def _expert_slots(num_slots: int, hidden: int, size: int) -> ExpertSlots:
    slots = ExpertSlots(num_slots, hidden, size, torch.bfloat16)
    for slot in range(num_slots):
        slots[slot].fill(_random(size, hidden), _random(size, hidden), _random(hidden, size))
    return slots


@dataclass(frozen=True, kw_only=True)
class Attention:
    """One layer's attention on one rank of a replica, with the norm before it and the sum after."""

    model: ModelConfig
    size: int
    module: GqaAttention | MlaAttention
    norm: RmsNorm
    rotary: RotaryTable

    @staticmethod
    def of(model: ModelConfig, tensor_parallel_size: int, max_context: int) -> Attention:
        make = _mla if isinstance(model.attention, MlaConfig) else _gqa
        return Attention(
            model=replace(model, num_layers=1, moe_layers=(0,)),
            size=tensor_parallel_size,
            module=make(model, tensor_parallel_size),
            norm=RmsNorm(_random(model.hidden_size), model.rms_norm_eps),
            rotary=RotaryTable(model.rope, max_context),
        )

    def decode(self, num_sequences: int, context: int) -> list[Call]:
        """One token of each sequence, which is the last of `context`."""
        positions_T = torch.full((num_sequences,), context - 1)
        return [self._call(positions_T, torch.arange(num_sequences), context)]

    def prefill(self, tokens: int) -> list[Call]:
        """All tokens of one prompt."""
        return [self._call(torch.arange(tokens), torch.zeros(tokens, dtype=torch.int64), tokens)]

    def _call(self, positions_T: Tensor, sequence_T: Tensor, context: int) -> Call:
        num_sequences, blocks = int(sequence_T[-1]) + 1, -(-context // BLOCK_SIZE)
        tables_NB = torch.randperm(num_sequences * blocks).view(num_sequences, blocks)
        block_T = tables_NB[sequence_T, positions_T // BLOCK_SIZE]
        batch = ForwardBatch(
            token_ids_T=torch.zeros_like(positions_T),
            positions_T=positions_T,
            kv_slots_T=block_T * BLOCK_SIZE + positions_T % BLOCK_SIZE,
            block_tables_NB=tables_NB,
            sequence_T=sequence_T,
            logit_rows=positions_T[:0],
        )
        ranks = Topology(num_nodes=1, ranks_per_node=self.size, tensor_parallel_size=self.size)
        kv = KVCache(self.model, ranks, num_sequences * blocks, BLOCK_SIZE, torch.bfloat16)
        plan, rotation = AttentionPlan.build(batch, BLOCK_SIZE), self.rotary.at(positions_T)
        x_TH = _random(len(positions_T), self.model.hidden_size)
        cache = kv.layers[0]

        def call() -> Tensor:
            out_TH: Tensor = self.module(self.norm(x_TH), rotation, cache, plan)
            return x_TH + out_TH

        return call


def _mla(model: ModelConfig, size: int) -> MlaAttention:
    config = model.attention
    assert isinstance(config, MlaConfig)
    hidden, heads = model.hidden_size, config.num_heads // size
    latent, rotary, nope = config.kv_lora_rank, config.qk_rope_head_dim, config.qk_nope_head_dim
    query = heads * (nope + rotary)
    rank = config.q_lora_rank
    return MlaAttention(
        config=config,
        w_down=_random((rank or query) + latent + rotary, hidden),
        q_norm=RmsNorm(_random(rank), model.rms_norm_eps) if rank else None,
        w_q_up=_random(query, rank) if rank else None,
        latent_norm=RmsNorm(_random(latent), model.rms_norm_eps),
        w_uk_NCM=_random(heads, latent, nope),
        w_uv_NVC=_random(heads, config.v_head_dim, latent),
        w_out_HN=_random(hidden, heads * config.v_head_dim),
    )


def _gqa(model: ModelConfig, size: int) -> GqaAttention:
    config = model.attention
    assert isinstance(config, GqaConfig)
    heads, dim = config.num_heads // size, config.head_dim
    num_kv = local_kv_heads(config.num_kv_heads, size)
    norms = [RmsNorm(_random(dim), model.rms_norm_eps) if config.qk_norm else None] * 2
    return GqaAttention(
        config=config,
        num_kv_heads=num_kv,
        w_qkv=_random((heads + 2 * num_kv) * dim, model.hidden_size),
        w_out_HN=_random(model.hidden_size, heads * dim),
        q_norm=norms[0],
        k_norm=norms[1],
    )


def _random(*shape: int) -> Tensor:
    """Of a size that stays that size through a layer."""
    return (torch.randn(shape) / math.sqrt(shape[-1])).to(torch.bfloat16)
