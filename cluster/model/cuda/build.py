"""From weights, wherever they come from, to the modules of a model on the device.

A source gives one tensor or one expert at a time, and it is copied before the next is read: a
checkpoint passes through the host in pieces.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from cluster.model.attention import GqaAttention
from cluster.model.config import ModelConfig
from cluster.model.cuda.gains import expert_gain
from cluster.model.cuda.gqa import CudaGqa
from cluster.model.cuda.layers import Attention, CudaLayer, DenseMlp
from cluster.model.cuda.mla import CudaMla
from cluster.model.cuda.ops import ExpertLayer, Ops
from cluster.model.cuda.replica import Mlp, Replica
from cluster.model.cuda.slots import DeviceSlots, TwoMatrices
from cluster.model.cuda.weights import Matrix, Norm
from cluster.model.mla import MlaAttention
from cluster.model.norm import RmsNorm
from comms.groups import ParallelGroups
from experts.mlp import GatedMLP
from router.gate import Gate
from router.placement import Placement


class WeightSource(Protocol):
    """Modules with their weights, on any device: `Loader` of a checkpoint, `RandomWeights`."""

    @property
    def config(self) -> ModelConfig: ...
    def embedding(self) -> Tensor: ...
    def head(self, embedding: Tensor) -> Tensor: ...
    def norm(self, name: str, size: int | None = None, eps: float | None = None) -> RmsNorm: ...
    def attention(self, layer: int) -> GqaAttention | MlaAttention: ...
    def dense_mlp(self, layer: int) -> GatedMLP: ...
    def shared_expert(self, layer: int) -> GatedMLP | None: ...
    def gate(self, layer: int) -> Gate: ...
    def expert(self, moe_idx: int, expert: int) -> TwoMatrices: ...
    @property
    def float8_experts(self) -> bool:
        """Whether `expert` gives e4m3."""


class Builder:
    """Puts one rank's modules on the device, those with large matrices as float8 if asked to."""

    def __init__(
        self,
        source: WeightSource,
        placement: Placement,
        groups: ParallelGroups,
        ops: Ops,
        replica: Replica,
        *,
        float8: bool,
        sums_in_integers: bool,
        device: torch.device,
        exchange: Any = None,
    ) -> None:
        self.config, self.device = source.config, device
        self._source, self._placement, self._ops = source, placement, ops
        self._world, self._rank, self._exchange = groups.world, groups.rank, exchange
        self._replica, self._leader = replica, groups.tp.ranks[0]
        self._float8, self._sums_in_integers = float8, sums_in_integers

    def embedding(self) -> Tensor:
        return self._source.embedding().to(self.device)

    def head(self, embedding: Tensor) -> Tensor:
        """The output projection stays in bfloat16; the embedding itself where they are tied."""
        return self._source.head(embedding).to(self.device)

    def norm(self, name: str) -> Norm:
        return self._norm(self._source.norm(name))

    def layer(self, idx: int) -> CudaLayer:
        mlp_norm = self.norm(f"layers.{idx}.post_attention_layernorm")
        attention_norm = self.norm(f"layers.{idx}.input_layernorm")
        attention = self._attention(self._source.attention(idx))
        has_experts = idx in self.config.moe_layers
        mlp = self._experts(idx, mlp_norm) if has_experts else self._dense(idx)
        return CudaLayer(
            attention_norm=attention_norm.for_matrices(float8=attention.reads_float8),
            attention=attention,
            mlp_norm=mlp_norm.for_matrices(float8=mlp.reads_float8),
            mlp=mlp,
            replica=self._replica,
        )

    def _attention(self, module: GqaAttention | MlaAttention) -> Attention:
        if isinstance(module, GqaAttention):
            return CudaGqa(
                config=module.config,
                num_kv_heads=module.num_kv_heads,
                w_qkv=self._matrix(module.w_qkv),
                w_out=self._matrix(module.w_out_HN),
                q_norm=module.q_norm and self._norm(module.q_norm),
                k_norm=module.k_norm and self._norm(module.k_norm),
                ops=self._ops,
            )
        w_q_up, q_norm = None, None
        if module.w_q_up is not None and module.q_norm is not None:
            w_q_up = self._matrix(module.w_q_up)
            q_norm = self._norm(module.q_norm).for_matrices(float8=w_q_up.is_float8)
        return CudaMla(
            config=module.config,
            w_down=self._matrix(module.w_down),
            q_norm=q_norm,
            w_q_up=w_q_up,
            latent_norm=self._norm(module.latent_norm),
            w_uk_NCM=module.w_uk_NCM.to(self.device),
            w_uv_NVC=module.w_uv_NVC.to(self.device),
            w_out=self._matrix(module.w_out_HN),
            ops=self._ops,
        )

    def _dense(self, idx: int) -> Mlp:
        mlp = self._source.dense_mlp(idx)
        local = DenseMlp(w13=self._matrix(mlp.w13), w2=self._matrix(mlp.w2), ops=self._ops)
        return self._replica.divided(local)

    def _experts(self, idx: int, norm: Norm) -> ExpertLayer:
        config, source = self.config, self._source
        moe_idx = config.moe_layers.index(idx)
        slots = DeviceSlots(
            self._placement.experts_of_rank(moe_idx, self._rank),
            lambda expert: source.expert(moe_idx, expert),
            num_slots=self._placement.slots_per_rank,
            hidden=config.hidden_size,
            intermediate=config.expert_intermediate_size,
            float8=self._float8 or source.float8_experts,
            device=self.device,
        )
        gate, shared = source.gate(idx), source.shared_expert(idx)
        bias_E = gate.correction_bias_E
        return self._ops.experts(
            Gate(
                gate.config,
                gate.weight_EH.to(self.device),
                None if bias_E is None else bias_E.to(self.device),
            ),
            slots,
            self._placement.layer(moe_idx),
            self._leader,  # copies of an expert are chosen alike for all rows of a replica
            None if shared is None else (self._matrix(shared.w13), self._matrix(shared.w2)),
            self._gains(moe_idx, slots, norm) if self._sums_in_integers else None,
            self._exchange,
        )

    def _gains(self, moe_idx: int, slots: DeviceSlots, norm: Norm) -> Tensor:
        """Of all experts. Collective: each rank measures its own."""
        mine_S = torch.zeros(slots.num_slots)
        for slot in self._placement.experts_of_rank(moe_idx, self._rank):
            mine_S[slot] = expert_gain(*slots.matrices(slot), norm.weight)
        all_S = self._world.all_gather(mine_S, [slots.num_slots] * self._world.size)
        experts_S = torch.tensor(self._placement.physical_to_logical[moe_idx])
        held = experts_S >= 0
        gains_E = torch.zeros(self.config.num_experts)
        gains_E.scatter_reduce_(0, experts_S[held], all_S[held], "amax")
        return gains_E.to(self.device)

    def _matrix(self, w_OI: Tensor) -> Matrix:
        return Matrix.of(w_OI, float8=self._float8, device=self.device)

    def _norm(self, norm: RmsNorm) -> Norm:
        return Norm(norm.weight.to(self.device), norm.eps)
