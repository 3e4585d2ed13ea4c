"""`cluster.model.cuda.ops.Ops` in plain torch on any device: the model without its kernels.

Products are in fp32 and rounded once, as the kernels' are. Slow and simple.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor
from torch.nn import functional as F

from experts.activation import silu_and_multiply
from experts.float8 import dequantized
from experts.gains import token_ranges
from experts.kernels.types import NormedRows


def _rotated(x_TNR: Tensor, step) -> Tensor:
    positions_T = step.inputs.positions_T.long()
    cos_T1F, sin_T1F = (t[positions_T].unsqueeze(1) for t in (step.cos_LF, step.sin_LF))
    x = x_TNR.float()
    a, b = (x[..., 0::2], x[..., 1::2]) if step.interleaved else x.chunk(2, dim=-1)
    turned = (a * cos_T1F - b * sin_T1F, b * cos_T1F + a * sin_T1F)
    out = torch.stack(turned, -1).flatten(-2) if step.interleaved else torch.cat(turned, -1)
    return out.to(x_TNR.dtype)


def _write(cache: Tensor, step, rows_TGD: Tensor) -> None:
    places_T = step.inputs.kv_slots_T.long()
    cache.flatten(1, 2)[:, places_T] = torch.nan_to_num(rows_TGD).transpose(0, 1)


def _quantized(x_TI: Tensor) -> Tensor:
    """What products in float8 make of their rows, 128 channels at a time: fp32."""
    blocks = F.pad(x_TI.float(), (0, -x_TI.shape[1] % 128)).unflatten(1, (-1, 128))
    scale = blocks.abs().amax(2, keepdim=True).clamp(min=1e-4) / 448
    return ((blocks / scale).to(torch.float8_e4m3fn).float() * scale).flatten(1)[:, : x_TI.shape[1]]


def _normed(x: Tensor, norm) -> Tensor:
    scale = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + norm.eps)
    return (x.float() * scale * norm.weight.float()).to(x.dtype)


class PlainOps:
    def linear(self, x_TI, w):
        x_TI = x_TI.x_RH if isinstance(x_TI, NormedRows) else x_TI
        if w.scale_PQ is None:
            return (x_TI.float() @ w.w_OI.float().T).to(torch.bfloat16)
        return (_quantized(x_TI) @ dequantized(w.w_OI, w.scale_PQ).T).to(torch.bfloat16)

    def linears(self, x_TNI, w_NOI, out_TNO=None):
        y = torch.einsum("tni,noi->tno", x_TNI.float(), w_NOI.float()).to(torch.bfloat16)
        return y if out_TNO is None else out_TNO.copy_(y)

    def rms_norm(self, x_TH, norm):
        return NormedRows(_normed(x_TH, norm))

    def add_rms_norm(self, x_TH, residual_TH, norm):
        total_TH = x_TH + residual_TH
        return self.rms_norm(total_TH, norm), total_TH

    def silu_and_multiply(self, gate_up):
        return silu_and_multiply(gate_up)

    def plan(self, inputs, block_size):
        return inputs

    def store_latents(self, latent_TX, query_TNX, norm, step, cache, q_TND):
        latent = len(norm.weight)
        rotary = latent_TX.shape[1] - latent
        latent_TC, key_TR = latent_TX.split([latent, rotary], dim=1)
        key_T1R = _rotated(key_TR.unsqueeze(1), step)
        normed_T1C = _normed(latent_TC, norm).unsqueeze(1)
        _write(cache.keys, step, torch.cat([normed_T1C, key_T1R], -1))
        q_TND[..., latent:] = _rotated(query_TNX[..., -rotary:], step)

    def store_heads(self, qkv_TX, q_norm, k_norm, num_kv_heads, step, cache):
        dim = cache.keys.shape[-1]
        heads = qkv_TX.unflatten(1, (-1, dim))
        num_heads = heads.shape[1] - 2 * num_kv_heads
        q_TND, k_TGD, v_TGD = heads.split([num_heads, num_kv_heads, num_kv_heads], dim=1)
        if q_norm is not None and k_norm is not None:
            q_TND, k_TGD = _normed(q_TND, q_norm), _normed(k_TGD, k_norm)
        _write(cache.keys, step, _rotated(k_TGD, step))
        _write(cache.values, step, v_TGD)
        return _rotated(q_TND, step)

    def attention(self, q_TND, cache, plan, scale, value_dim):
        keys, values = cache.keys.float(), cache.values.float()
        group = q_TND.shape[1] // len(keys)
        out_TNV = q_TND.new_zeros(*q_TND.shape[:2], value_dim)
        for t in range(int(plan.num_tokens)):
            length = int(plan.positions_T[t]) + 1
            blocks = plan.block_tables_NB[plan.sequence_T[t].long()].long()
            k = keys[:, blocks].flatten(1, 2)[:, :length].repeat_interleave(group, 0)
            v = values[:, blocks].flatten(1, 2)[:, :length, :value_dim].repeat_interleave(group, 0)
            weights = (torch.einsum("hd,hsd->hs", q_TND[t].float(), k) * scale).softmax(-1)
            out_TNV[t] = torch.einsum("hs,hsv->hv", weights, v).to(out_TNV.dtype)
        return out_TNV

    def experts(self, gate, slots, placement, rank, shared, gains_E, exchange=None):
        return PlainExperts(self, gate, slots, placement, rank, shared, gains_E)


class PlainExperts:
    def __init__(self, ops, gate, slots, placement, rank, shared, gains_E):
        self.ops, self.gate, self.slots, self.layer_placement = ops, gate, slots, placement
        self.rank, self.shared, self.gains_E = rank, shared, gains_E
        self.choice, self.record = SimpleNamespace(prepare=lambda layer: None), None
        self.forget_counters()

    def forget_counters(self):
        self.routed_E = torch.zeros(self.layer_placement.num_experts, dtype=torch.int64)
        self.tokens_per_slot_S = torch.zeros(self.slots.num_slots, dtype=torch.int64)
        self.recent_TK = torch.empty(0, 1, dtype=torch.int64)

    reads_float8 = False

    @property
    def num_bytes(self):
        tensors = [self.gate.weight_EH, self.gate.correction_bias_E]
        tensors += [] if self.shared is None else [matrix.w_OI for matrix in self.shared]
        return sum(x.nbytes for x in tensors if x is not None)

    def forward(self, rows, num_tokens=None):
        x_TH = rows.x_RH
        size = len(x_TH) if num_tokens is None else int(num_tokens)
        out_TH = torch.zeros_like(x_TH)
        ids_TK, weights_TK = self.gate(x_TH[:size], lambda x, w: x @ w.T)
        slots_TK = self.layer_placement.choose_slots(ids_TK.cpu(), self.rank)
        self.recent_TK = ids_TK
        self.routed_E += torch.bincount(ids_TK.flatten().cpu(), minlength=len(self.routed_E))
        self.tokens_per_slot_S += torch.bincount(slots_TK.flatten(), minlength=self.slots.num_slots)
        if self.record is not None:
            self.record.append(ids_TK)
        for t in range(size):
            terms = []
            for slot in slots_TK[t].tolist():
                w13, w2 = self.slots.matrices(slot)
                rows = _quantized if self.slots.experts.is_float8 else Tensor.float
                gate_up = (rows(x_TH[t : t + 1]) @ w13.T).to(torch.bfloat16)
                terms.append((rows(silu_and_multiply(gate_up)) @ w2.T).to(torch.bfloat16)[0])
            out_TH[t] = self._sum(torch.stack(terms), ids_TK[t], weights_TK[t])
        if self.shared is not None:
            hidden = silu_and_multiply(self.ops.linear(x_TH, self.shared[0]))
            out_TH = out_TH + self.ops.linear(hidden, self.shared[1])
        return out_TH

    def _sum(self, y_KH, ids_K, weights_K):
        terms_KH = y_KH.float() * weights_K[:, None]
        if self.gains_E is None:
            return terms_KH.sum(0)
        step = token_ranges(ids_K[None].cpu(), weights_K[None].cpu(), self.gains_E.cpu())
        step = step.to(y_KH.device) / 2**15
        return (terms_KH / step).round().sum(0) * step
