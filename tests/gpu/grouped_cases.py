"""Experts, pairs and fp64 answers for the tests of the grouped kernels, in plain torch.

Legend: R rows, K experts per token, P pairs, S slots, H hidden, I intermediate.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from experts.kernels.types import BLOCK, DeviceExperts, QuantizedRows, SortedPairs

FP8 = torch.float8_e4m3fn


def sorted_pairs(slots_RK: Tensor, num_slots: int) -> SortedPairs:
    """What experts/kernels/sort_by_slot.py makes."""
    slot_P = slots_RK.flatten()
    order_P = torch.where(slot_P < 0, num_slots, slot_P).argsort(stable=True)
    num_pairs = int((slot_P >= 0).sum())
    pair_P = torch.full_like(slot_P, -1, dtype=torch.int32)
    pair_P[:num_pairs] = order_P[:num_pairs].to(torch.int32)
    place_P = torch.full_like(pair_P, -1)
    place_P[order_P[:num_pairs]] = torch.arange(num_pairs, dtype=torch.int32, device=slot_P.device)
    counts_S = torch.bincount(slot_P[slot_P >= 0], minlength=num_slots)
    return SortedPairs(
        pair_P=pair_P,
        place_RK=place_P.view(slots_RK.shape),
        ends_S=counts_S.cumsum(0).to(torch.int32),
    )


def quantized(x_RH: Tensor) -> QuantizedRows:
    """What experts/kernels/quantize.py makes."""
    x_RBC = x_RH.float().unflatten(1, (-1, BLOCK))
    scale_RB = x_RBC.abs().amax(2).clamp(min=1e-4) / 448
    return QuantizedRows(q_RH=(x_RBC / scale_RB[:, :, None]).flatten(1).to(FP8), scale_RB=scale_RB)


def dequantized(x: QuantizedRows) -> Tensor:
    """x_RH in fp64."""
    return (x.q_RH.double().unflatten(1, (-1, BLOCK)) * x.scale_RB.double()[:, :, None]).flatten(1)


@dataclass(frozen=True, kw_only=True)
class Case:
    """Experts in more buffers than slots, and the same weights in fp64."""

    experts: DeviceExperts
    w13: Tensor
    w2: Tensor

    @staticmethod
    def random(
        dtype: torch.dtype, num_slots: int, hidden: int, intermediate: int, device: str
    ) -> Case:
        buffers = num_slots + 2
        w13, w13_scale, w13_exact = _weights(dtype, buffers, 2 * intermediate, hidden, device)
        w2, w2_scale, w2_exact = _weights(dtype, buffers, hidden, intermediate, device)
        experts = DeviceExperts(
            w13_BNH=w13,
            w2_BHI=w2,
            buffer_S=torch.randperm(buffers, device=device)[:num_slots].to(torch.int32),
            w13_scale=w13_scale,
            w2_scale=w2_scale,
        )
        return Case(experts=experts, w13=w13_exact, w2=w2_exact)

    def expected(self, x: Tensor | QuantizedRows, pairs: SortedPairs) -> Tensor:
        """fp64 outputs of all pairs there are."""
        x_RH = x.double() if isinstance(x, Tensor) else dequantized(x)
        num_pairs = int(pairs.ends_S[-1])
        y_PH = x_RH.new_empty(num_pairs, x_RH.shape[1])
        first = 0
        for slot, end in enumerate(pairs.ends_S.tolist()):
            buffer = int(self.experts.buffer_S[slot])
            rows = (pairs.pair_P[first:end] // pairs.num_topk).long()
            gate, up = (x_RH[rows] @ self.w13[buffer].T).chunk(2, 1)
            y_PH[first:end] = (torch.nn.functional.silu(gate) * up) @ self.w2[buffer].T
            first = end
        return y_PH


def worst_error(y_PH: Tensor, expected_PH: Tensor) -> float:
    """Greatest relative L2 of a row; NaN counts as infinite."""
    error_P = (y_PH.double() - expected_PH).norm(dim=1) / expected_PH.norm(dim=1)
    return float(error_P.nan_to_num(nan=float("inf")).max())


def random_rows(num_rows: int, hidden: int, device: str) -> Tensor:
    """Rows whose sums cancel: large channels of both signs beside small ones."""
    x = torch.randn(num_rows, hidden, device=device)
    x *= torch.where(torch.rand(hidden, device=device) < 0.05, 8.0, 1.0)
    return x.to(torch.bfloat16)


def _weights(
    dtype: torch.dtype, num: int, out_features: int, in_features: int, device: str
) -> tuple[Tensor, Tensor | None, Tensor]:
    """(weights, scales, their exact values)."""
    w = torch.randn(num, out_features, in_features, device=device) * in_features**-0.5
    if dtype != FP8:
        w = w.to(dtype)
        return w, None, w.double()
    shape = (num, out_features // BLOCK, BLOCK, in_features // BLOCK, BLOCK)
    blocks = w.view(shape)
    scale = blocks.abs().amax((2, 4)) / 448
    q = (blocks / scale[:, :, None, :, None]).to(FP8)
    exact = q.double() * scale.double()[:, :, None, :, None]
    return q.view(w.shape), scale, exact.view(w.shape)
