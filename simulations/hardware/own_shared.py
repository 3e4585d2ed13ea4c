"""What a model's shared expert adds to a layer: it runs beside gate and routed experts, on a second stream.

So it is measured as the difference between a layer with it and the same without, on a rank with few
experts of a cluster where every rank brings as many tokens.

Legend: T tokens, R rows here, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from cluster.model.config import ModelConfig
from cluster.model.cuda.weights import Matrix
from experts.cuda_moe import CudaMoELayer, Rows, SharedExpert
from experts.kernels.choose import Choice
from experts.kernels.combine import weighted_sum
from experts.kernels.types import DeviceExperts, SortedPairs
from router.gate import Gate
from router.placement import Placement
from simulations.hardware.gpu_grid import Grid
from simulations.hardware.gpu_meter import Meter
from simulations.hardware.gpu_timing import Timing
from simulations.hardware.own_experts import OwnExperts, chance_counts
from simulations.hardware.own_products import normal

EXPERTS = (4, 3, 2, 1)  # of the rank: the first that divides all
MOST_ROWS = 1024  # of each
LEAST_SHARE = 0.02  # of the layer that it adds at least, whatever noise says


def shared_grid(model: ModelConfig, rows: Sequence[int], dtype: str, meter: Meter) -> Grid:
    """ "shared_expert/<dtype>/<hidden>x<intermediate>" by tokens."""
    hidden, size = model.hidden_size, model.shared_intermediate_size
    return Grid(
        name=f"shared_expert/{dtype}/{hidden}x{size}",
        axes={"tokens": rows},
        time=SharedBeside(model, dtype, meter).seconds,
        notes={"what": "what it adds to gate and routed experts, beside which it may run"},
    )


@dataclass(frozen=True, kw_only=True)
class Pool:
    """Whose buffers a layer reads."""

    experts: DeviceExperts


@dataclass(frozen=True, kw_only=True)
class Here:
    """An `Exchange` without a wire: rows that are here already."""

    rows: Rows
    slots_RK: Tensor
    weights_RK: Tensor

    def routed(
        self,
        x_TH: Tensor,
        choice: Choice,
        compute: Callable[[Rows, Tensor], tuple[Tensor, SortedPairs]],
    ) -> Tensor:
        y_PH, pairs = compute(self.rows, self.slots_RK)
        return weighted_sum(y_PH, pairs, self.weights_RK)[: len(x_TH)]


class SharedBeside:
    def __init__(self, model: ModelConfig, dtype: str, meter: Meter) -> None:
        self._model, self._meter = model, meter
        self._own = OwnExperts(model, dtype, meter)
        self._number = next(n for n in EXPERTS if model.num_experts % n == 0)

    def seconds(self, tokens: int) -> Timing:
        """A layer with the shared expert, less the same without."""
        x_TH = normal(self._meter, tokens, self._model.hidden_size)
        layers = self._layers(tokens)
        both = self._meter.seconds([partial(layer.forward, x_TH) for layer in layers])
        for layer in layers:
            layer.shared_expert = None
        without = self._meter.seconds([partial(layer.forward, x_TH) for layer in layers])
        added = max(both.p50 - without.p50, LEAST_SHARE * both.p50)
        return Timing(p50=added, p99=added * both.p99 / both.p50)

    def _layers(self, tokens: int) -> list[CudaMoELayer]:
        """As many as do not fit the L2 cache together."""
        own, model, number, device = self._own, self._model, self._number, self._meter.device
        w13 = own.matrix(2 * model.shared_intermediate_size, model.hidden_size)
        w2 = own.matrix(model.hidden_size, model.shared_intermediate_size)
        num_bytes = number * own.expert_bytes + w13.num_bytes + w2.num_bytes
        sets = len(self._meter.copies(lambda: None, num_bytes))
        here, experts, layers = self._here(tokens), own.layers(number, sets), []
        gate = model.gate
        placement = Placement.contiguous(1, gate.num_experts, gate.num_experts // number)
        for i in range(sets):
            weight_EH = normal(self._meter, gate.num_experts, model.hidden_size).float()
            bias_E = torch.randn(gate.num_experts, device=device)
            layers.append(
                CudaMoELayer(
                    gate=Gate(gate, weight_EH, bias_E if model.has_correction_bias else None),
                    slots=Pool(experts=experts[i]),
                    layer_placement=placement.layer(0),
                    shared_expert=_shared(w13, w2),
                    exchange=here,
                )
            )
        return layers

    def _here(self, tokens: int) -> Here:
        """The rows of this rank's experts; at least as many as the tokens, whose places they take."""
        mean = tokens * self._model.gate.num_experts_per_token // self._number
        counts_E = chance_counts(self._number, min(max(mean, 1), MOST_ROWS))
        slots_RK = self._own.slots_RK(counts_E)
        slots_RK = F.pad(slots_RK, (0, 0, 0, max(0, tokens - len(slots_RK))), value=-1)
        return Here(
            rows=self._own.rows(len(slots_RK)),
            slots_RK=slots_RK,
            weights_RK=torch.rand(slots_RK.shape, device=self._meter.device),
        )


def _shared(w13: Matrix, w2: Matrix) -> SharedExpert:
    """With weights of its own."""
    return SharedExpert(
        w13=w13.w_OI.clone(), w2=w2.w_OI.clone(), w13_scale=w13.scale_PQ, w2_scale=w2.scale_PQ
    )
