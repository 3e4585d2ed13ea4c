"""Expert layers of one card of 64, and what each part of one costs.

Legend: T tokens, H hidden, P pairs, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from router.gate import Gate
from router.placement import Placement
from simulations.bench.bench_experts import Ceilings, random_weights
from simulations.bench.card_step import CARDS, EXPERTS, GATE, Arrived, arrived, rows_of
from simulations.hardware.gpu_timing import copies_of, seconds_of

if TYPE_CHECKING:
    from experts.cuda_moe import CudaMoELayer
    from experts.kernels.types import DeviceExperts, SortedPairs

LAYERS = 3  # take turns, so that no weights are found in the L2 cache


@dataclass(frozen=True, kw_only=True)
class Pool:
    """Whose buffers a layer reads."""

    experts: DeviceExperts


class CardLayers:
    """A few layers with weights of their own, and steps for them."""

    def __init__(self, tokens: int, hidden: int, intermediate: int, dtype: str) -> None:
        self.tokens, self.hidden, self.intermediate = tokens, hidden, intermediate
        self.dtype = dtype
        self.layers = [self._layer(seed) for seed in range(LAYERS)]
        self.x_TH = torch.randn(tokens, hidden, device="cuda", dtype=torch.bfloat16)

    def _layer(self, seed: int) -> CudaMoELayer:
        from experts.cuda_moe import CudaMoELayer, SharedExpert
        from experts.kernels.types import DeviceExperts

        hidden, intermediate, num = self.hidden, self.intermediate, EXPERTS
        w13, w13_scale = random_weights(self.dtype, num, 2 * intermediate, hidden)
        w2, w2_scale = random_weights(self.dtype, num, hidden, intermediate)
        s13, s13_scale = random_weights(self.dtype, 1, 2 * intermediate, hidden)
        s2, s2_scale = random_weights(self.dtype, 1, hidden, intermediate)
        weight_EH = torch.randn(GATE.num_experts, hidden, device="cuda") / hidden**0.5
        bias_E = torch.randn(GATE.num_experts, device="cuda") / 10
        return CudaMoELayer(
            gate=Gate(GATE, weight_EH, bias_E),
            slots=Pool(
                experts=DeviceExperts(
                    w13_BNH=w13, w2_BHI=w2, w13_scale=w13_scale, w2_scale=w2_scale,
                    buffer_S=torch.arange(num, device="cuda", dtype=torch.int32),
                )
            ),
            layer_placement=Placement.contiguous(1, GATE.num_experts, CARDS).layer(0),
            shared_expert=SharedExpert(
                w13=s13[0], w2=s2[0],
                w13_scale=None if s13_scale is None else s13_scale[0],
                w2_scale=None if s2_scale is None else s2_scale[0],
            ),
            exchange=arrived(self.tokens, hidden, self.dtype, seed),
        )  # fmt: skip

    @property
    def steps(self) -> list[Arrived]:
        return [layer.exchange for layer in self.layers if isinstance(layer.exchange, Arrived)]

    def measure(self, ceilings: Ceilings) -> dict[str, Any]:
        """Microseconds of the layer, of the same on one stream, of its parts alone, and the floor."""
        beside_s = seconds_of([lambda m=m: m.forward(self.x_TH) for m in self.layers])  # type: ignore[misc]
        alone_s = seconds_of([lambda m=m: self._one_stream(m) for m in self.layers])  # type: ignore[misc]
        rows = float(np.mean([len(step.slots_RK) for step in self.steps]))
        pairs = float(np.mean([int((step.slots_RK >= 0).sum()) for step in self.steps]))
        parts = {name: 1e6 * seconds for name, seconds in self._parts().items()}
        total = sum(parts.values())
        memory_s, arithmetic_s = self._floor(ceilings, rows, pairs)
        floor_s = max(memory_s, arithmetic_s)
        return {
            "tokens": self.tokens,
            "rows": rows,
            "pairs": pairs,
            "layer_us": round(1e6 * beside_s.p50, 2),
            "layer_p99_us": round(1e6 * beside_s.p99, 2),
            "one_stream_us": round(1e6 * alone_s.p50, 2),
            "floor_us": round(1e6 * floor_s, 2),
            "memory_us": round(1e6 * memory_s, 2),
            "arithmetic_us": round(1e6 * arithmetic_s, 2),
            "over_floor": round(beside_s.p50 / floor_s, 3),
            "parts_us": {name: round(time, 2) for name, time in parts.items()},
            "with_gaps_us": {name: round(1e6 * s, 2) for name, s in self._with_gaps().items()},
            "experts_with_even_counts_us": round(1e6 * self._even(), 2),
            "counts": [step.counts() for step in self.steps],
            "share": {name: round(time / total, 3) for name, time in parts.items()},
        }

    def _one_stream(self, layer: CudaMoELayer) -> Tensor:
        """What `forward` does, one thing after the other."""
        assert layer.shared_expert is not None
        assert isinstance(layer.exchange, Arrived)
        shared_TH = layer.shared_expert(self.x_TH)
        choice = layer.choose(self.x_TH)
        compute = partial(layer.compute, expected_pairs=choice.ids_TK.numel())
        return layer.exchange.routed(self.x_TH, choice, compute) + shared_TH

    def _parts(self) -> dict[str, float]:
        """Seconds of each part alone: of the launches of a layer, those that do this."""
        from experts.kernels.choose import choose_slots
        from experts.kernels.linear import linear_fp32
        from experts.kernels.sort_by_slot import sort_by_slot

        layers, steps = self.layers, self.steps
        logits_TE = linear_fp32(self.x_TH, layers[0].gate.weight_EH)
        bias_E, experts = layers[0].gate.correction_bias_E, layers[0].slots.experts.num_slots
        sorted_steps = [sort_by_slot(step.slots_RK, experts) for step in steps]
        outputs = [
            self._ffn(step.rows, pairs, layer)
            for step, pairs, layer in zip(steps, sorted_steps, layers, strict=True)
        ]
        many = copies_of(lambda: torch.empty(1), 4.0 * GATE.num_experts * self.hidden)
        gates = [layers[i % LAYERS].gate.weight_EH.clone() for i in range(len(many))]
        homes = [replace(steps[0], home_YH=steps[0].home_YH.clone()) for _ in many]
        calls: dict[str, list[Callable[[], object]]] = {
            "gate": [lambda w=w: linear_fp32(self.x_TH, w) for w in gates],  # type: ignore[misc]
            "choose": [lambda: choose_slots(logits_TE, GATE, bias_E)],
            "sort": [lambda s=s: sort_by_slot(s.slots_RK, experts) for s in steps],  # type: ignore[misc]
            "experts": [
                lambda s=s, p=p, m=m: self._ffn(s.rows, p, m)  # type: ignore[misc]
                for s, p, m in zip(steps, sorted_steps, layers, strict=True)
            ],
            "partial sums": [
                lambda s=s, p=p, y=y: s.partial(y, p)  # type: ignore[misc]
                for s, p, y in zip(steps, sorted_steps, outputs, strict=True)
            ],
            "sum at home": [lambda s=s: s.sum_home() for s in homes],  # type: ignore[misc]
            "shared expert": [lambda m=m: m.shared_expert(self.x_TH) for m in layers],  # type: ignore[misc]
        }
        return {name: seconds_of(calls_of).p50 for name, calls_of in calls.items()}

    def _even(self) -> float:
        """Seconds of the grouped products if each expert had the same number of rows, as benchmarks of
        products have it: what the last, nearly empty tile of each expert costs is not in it."""
        from experts.kernels.sort_by_slot import sort_by_slot

        slots_RK = torch.full(
            (self.tokens * 2 * EXPERTS, GATE.num_experts_per_token), -1, device="cuda"
        )
        slots_RK[:, 0] = torch.arange(len(slots_RK), device="cuda") % EXPERTS
        x_RH = torch.randn(len(slots_RK), self.hidden, device="cuda", dtype=torch.bfloat16)
        rows, pairs = rows_of(x_RH, self.dtype), sort_by_slot(slots_RK, EXPERTS)
        calls = [lambda m=m: self._ffn(rows, pairs, m) for m in self.layers]
        return seconds_of(calls).p50

    def _ffn(self, rows: Any, pairs: SortedPairs, layer: CudaMoELayer) -> Tensor:
        from experts.kernels.grouped import expert_ffn

        expected = self.tokens * GATE.num_experts_per_token
        return expert_ffn(rows, pairs, layer.slots.experts, expected_pairs=expected)

    def _with_gaps(self) -> dict[str, float]:
        """Seconds of what costs more when the rows lie where a receive buffer of static shape has them."""
        from experts.kernels.sort_by_slot import sort_by_slot

        step = arrived(self.tokens, self.hidden, self.dtype, 0, with_gaps=True)
        pairs = sort_by_slot(step.slots_RK, EXPERTS)
        calls = [lambda m=m: self._ffn(step.rows, pairs, m) for m in self.layers]
        return {
            "sort": seconds_of([lambda: sort_by_slot(step.slots_RK, EXPERTS)]).p50,
            "experts": seconds_of(calls).p50,
        }

    def _floor(self, ceilings: Ceilings, rows: float, pairs: float) -> tuple[float, float]:
        """(seconds of the bytes, seconds of the arithmetic)."""
        hidden, weights = self.hidden, 3.0 * self.hidden * self.intermediate
        size = 1 if self.dtype == "float8" else 2
        row_bytes = hidden * size + (4 * hidden // 128 if self.dtype == "float8" else 0)
        num_bytes = (EXPERTS + 1) * weights * size
        num_bytes += GATE.num_experts * hidden * 4  # the gate, in fp32
        num_bytes += rows * (row_bytes + 2 * hidden)
        num_bytes += self.tokens * (GATE.num_experts_per_token + 2) * 2 * hidden
        flops = ceilings.float8_flops if self.dtype == "float8" else ceilings.bfloat16_flops
        return num_bytes / ceilings.bytes_per_s, 2 * (pairs + self.tokens) * weights / flops
