"""Our routed experts at a model's sizes: one rank's, from sorted pairs to the rows' sums.

Rows per expert scatter by chance, as a gate's do: a table of equal counts would hide what the last,
nearly empty tile of every expert costs.

Legend: R rows, K experts per token, P pairs, E experts here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import NormalDist

import numpy as np
import torch
from torch import Tensor

from cluster.model.config import ModelConfig
from cluster.model.cuda.weights import Matrix
from experts.cuda_moe import Rows
from experts.kernels.combine import weighted_sum
from experts.kernels.grouped import expert_ffn
from experts.kernels.quantize import quantize
from experts.kernels.sort_by_slot import sort_by_slot
from experts.kernels.types import DeviceExperts
from simulations.hardware.gpu_grid import Grid
from simulations.hardware.gpu_meter import Meter
from simulations.hardware.gpu_timing import Timing
from simulations.hardware.own_products import normal

MOST_PAIRS = 1 << 16


def expert_grid(
    model: ModelConfig,
    experts: Sequence[int],
    tokens_per_expert: Sequence[int],
    dtype: str,
    meter: Meter,
) -> Grid:
    """ "active_experts/<dtype>/<hidden>x<intermediate>": sorting, both products, the rows' sums."""
    hidden = model.hidden_size
    return Grid(
        name=f"active_experts/{dtype}/{hidden}x{model.expert_intermediate_size}",
        axes={"experts": experts, "tokens_per_expert": tokens_per_expert},
        time=OwnExperts(model, dtype, meter).scattered,
        fits=lambda number, mean: number * mean <= MOST_PAIRS,
        notes={"what": "sorting, products with activation, sums; rows scatter as by chance"},
    )


class OwnExperts:
    """The experts of one rank, with weights that are made anew for every measurement."""

    def __init__(self, model: ModelConfig, dtype: str, meter: Meter) -> None:
        self._model, self._float8, self._meter = model, dtype == "float8", meter
        weights = 3 * model.hidden_size * model.expert_intermediate_size
        self.expert_bytes = float(weights * (1 if self._float8 else 2))

    def scattered(self, number: int, mean: int) -> Timing:
        """`number` experts with `mean` rows each, more or less: a standard deviation of sqrt(mean)."""
        return self.counted(chance_counts(number, mean))

    def counted(self, counts_E: Sequence[int]) -> Timing:
        """Exactly so many rows each."""
        return self._seconds([counts_E] * self._sets(len(counts_E)))

    def layers(self, number: int, sets: int) -> list[DeviceExperts]:
        """With `number` experts each, in buffers of their own; the weights of one, again and again."""
        hidden, intermediate = self._model.hidden_size, self._model.expert_intermediate_size
        first, second = self.matrix(2 * intermediate, hidden), self.matrix(hidden, intermediate)
        w13, w13_scale = _repeated(first, number * sets)
        w2, w2_scale = _repeated(second, number * sets)
        slots = torch.arange(number * sets, device=self._meter.device, dtype=torch.int32)
        pool = DeviceExperts(
            w13_BNH=w13, w2_BHI=w2, buffer_S=slots, w13_scale=w13_scale, w2_scale=w2_scale
        )
        return [replace(pool, buffer_S=buffer_S) for buffer_S in slots.split(number)]

    def slots_RK(self, counts_E: Sequence[int]) -> Tensor:
        """These numbers of pairs, dealt to as many rows as would have that many experts here."""
        gate = self._model.gate
        here = gate.num_experts_per_token * len(counts_E) / gate.num_experts
        each = int(np.clip(round(here), 1, gate.num_experts_per_token))
        slots_P = np.repeat(np.arange(len(counts_E)), counts_E)
        slots_P = np.random.default_rng(0).permutation(slots_P)
        dealt = np.full(-(-len(slots_P) // each) * each, -1)
        dealt[: len(slots_P)] = slots_P
        slots_RK = np.full((len(dealt) // each, gate.num_experts_per_token), -1)
        slots_RK[:, :each] = dealt.reshape(-1, each)
        return torch.from_numpy(slots_RK).to(self._meter.device, torch.int32)

    def rows(self, number: int) -> Rows:
        """As experts of that dtype take them."""
        x_RH = normal(self._meter, number, self._model.hidden_size)
        return quantize(x_RH) if self._float8 else x_RH

    def matrix(self, outputs: int, inputs: int) -> Matrix:
        return Matrix.of(normal(self._meter, outputs, inputs), float8=self._float8)

    def _sets(self, number: int) -> int:
        return len(self._meter.copies(lambda: None, number * self.expert_bytes))

    def _seconds(self, counts: Sequence[Sequence[int]]) -> Timing:
        """Of one layer; each entry of `counts` is another one with experts of its own."""
        layers = self.layers(len(counts[0]), len(counts))
        pairs = zip(layers, counts, strict=True)
        return self._meter.seconds([self._call(layer, counts_E) for layer, counts_E in pairs])

    def _call(self, experts: DeviceExperts, counts_E: Sequence[int]) -> Callable[[], object]:
        slots_RK = self.slots_RK(counts_E)
        rows = self.rows(len(slots_RK))
        weights_RK = torch.rand(slots_RK.shape, device=self._meter.device)
        range_R = 8 + torch.rand(len(slots_RK), device=self._meter.device)
        expected = sum(counts_E)

        def call() -> Tensor:
            pairs = sort_by_slot(slots_RK, experts.num_slots)
            y_PH = expert_ffn(rows, pairs, experts, expected_pairs=expected)
            return weighted_sum(y_PH, pairs, weights_RK, range_R=range_R)

        return call


def chance_counts(number: int, mean: int) -> list[int]:
    """As many rows for each of `number` experts as a normal variate's quantiles say, of standard
    deviation sqrt(mean); at least one each, `number * mean` together, in an order that tells nothing."""
    normal_at = NormalDist().inv_cdf
    z = np.array([normal_at((i + 0.5) / number) for i in range(number)])
    counts = np.maximum(np.rint(mean + np.sqrt(mean) * z), 1).astype(int)
    while (extra := int(counts.sum()) - number * mean) != 0:
        counts[np.argmax(counts) if extra > 0 else np.argmin(counts)] -= np.sign(extra)
    return [int(n) for n in np.random.default_rng(1).permutation(counts)]


def _repeated(matrix: Matrix, number: int) -> tuple[Tensor, Tensor | None]:
    scale = matrix.scale_PQ
    return (
        matrix.w_OI.expand(number, -1, -1).contiguous(),
        None if scale is None else scale.expand(number, -1, -1).contiguous(),
    )
