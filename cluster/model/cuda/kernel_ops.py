"""The functions of `Ops` as Triton kernels: the only module of the model that imports them."""

from __future__ import annotations

from torch import Tensor

from cluster.model.cuda import fused
from cluster.model.cuda.attention import AttentionMeta, paged_attention
from cluster.model.cuda.inputs import StepInputs
from cluster.model.cuda.ops import Added, ExpertLayer, Ops, Step
from cluster.model.cuda.slots import DeviceSlots
from cluster.model.cuda.weights import Matrix, Norm
from cluster.model.kv_cache import LayerCache
from cluster.model.norm import RmsNorm
from experts.cuda_moe import CudaMoELayer, Exchange, SharedExpert
from experts.kernels import combine, linear
from experts.kernels.types import NormedRows, QuantizedRows
from router.gate import Gate
from router.placement import LayerPlacement


class KernelOps(Ops):
    """On a GPU, or in Triton's interpreter."""

    def linear(self, x_TI: Tensor | NormedRows, w: Matrix) -> Tensor:
        x = x_TI.for_matrix(float8=w.is_float8) if isinstance(x_TI, NormedRows) else x_TI
        return linear.linear(x, w.w_OI, w.scale_PQ)

    def linears(self, x_TNI: Tensor, w_NOI: Tensor, out_TNO: Tensor | None = None) -> Tensor:
        return linear.linears(x_TNI, w_NOI, out_TNO)

    def rms_norm(self, x_TH: Tensor, norm: Norm) -> NormedRows:
        quantized = _room(x_TH, norm)
        return NormedRows(fused.rms_norm(x_TH, norm.weight, norm.eps, quantized), quantized)

    def add_rms_norm(
        self, x_TH: Added, residual_TH: Tensor, norm: Norm
    ) -> tuple[NormedRows, Tensor]:
        how = (residual_TH, norm.weight, norm.eps, _room(residual_TH, norm))
        found = x_TH.normed(*how) if isinstance(x_TH, combine.Unsummed) else None
        if found is None:
            found = fused.add_rms_norm(x_TH if isinstance(x_TH, Tensor) else x_TH.sum(), *how)
        normed_TH, sum_TH = found
        return NormedRows(normed_TH, how[-1]), sum_TH

    def silu_and_multiply(self, gate_up: Tensor) -> Tensor:
        return fused.silu_and_multiply(gate_up)

    def plan(self, inputs: StepInputs, block_size: int) -> AttentionMeta:
        return AttentionMeta(
            positions_T=inputs.positions_T,
            sequence_T=inputs.sequence_T,
            block_tables_SB=inputs.block_tables_NB,
            num_tokens=inputs.num_tokens,
        )

    def store_latents(
        self,
        latent_TX: Tensor,
        query_TNX: Tensor,
        norm: RmsNorm,
        step: Step,
        cache: LayerCache,
        q_TND: Tensor,
    ) -> None:
        inputs = step.inputs
        fused.mla_write(
            query_TNX, latent_TX, norm.weight, norm.eps, _table(step), inputs.positions_T,
            inputs.kv_slots_T, cache.keys, q_TND,
        )  # fmt: skip

    def store_heads(
        self,
        qkv_TX: Tensor,
        q_norm: RmsNorm | None,
        k_norm: RmsNorm | None,
        num_kv_heads: int,
        step: Step,
        cache: LayerCache,
    ) -> Tensor:
        inputs, dim = step.inputs, cache.keys.shape[-1]
        return fused.gqa_write(
            qkv_TX, qkv_TX.shape[1] // dim - 2 * num_kv_heads,
            None if q_norm is None else q_norm.weight, None if k_norm is None else k_norm.weight,
            0.0 if q_norm is None else q_norm.eps, _table(step), inputs.positions_T,
            inputs.kv_slots_T, cache.keys, cache.values,
        )  # fmt: skip

    def attention(
        self, q_TND: Tensor, cache: LayerCache, plan: AttentionMeta, scale: float, value_dim: int
    ) -> Tensor:
        return paged_attention(q_TND, cache.keys, cache.values, plan, scale, value_dim)

    def experts(
        self,
        gate: Gate,
        slots: DeviceSlots,
        placement: LayerPlacement,
        rank: int,
        shared: tuple[Matrix, Matrix] | None,
        gains_E: Tensor | None,
        exchange: Exchange | None = None,
    ) -> ExpertLayer:
        shared_expert = None
        if shared is not None:
            w13, w2 = shared
            shared_expert = SharedExpert(
                w13=w13.w_OI, w2=w2.w_OI, w13_scale=w13.scale_PQ, w2_scale=w2.scale_PQ
            )
        return CudaMoELayer(
            gate=gate,
            slots=slots,
            layer_placement=placement,
            rank=rank,
            shared_expert=shared_expert,
            gains_E=gains_E,
            exchange=exchange,
        )


def _room(x_TH: Tensor, norm: Norm) -> QuantizedRows | None:
    return QuantizedRows.empty(len(x_TH), x_TH.shape[1], x_TH.device) if norm.float8 else None


def _table(step: Step) -> fused.RopeTable:
    return fused.RopeTable(cos_LF=step.cos_LF, sin_LF=step.sin_LF, interleaved=step.interleaved)
