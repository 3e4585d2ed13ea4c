"""Seconds of a layer's routed experts on each rank, from the tokens of each local expert.

A rank's time is the sum over its experts of what one costs: reading its weights, or computing its
tokens in whole tiles, whichever takes longer. So skew costs nothing while weights are what takes
time, and everything when tokens are: no factor of imbalance can say both.

What an expert costs is looked up by its number of tokens: any curve is as fast as any other. A table
"active_experts" has a curve for each number of experts that have tokens: with few of them a launch and
the memory's latency are most of it, whoever else is on the rank.

B steps, L expert layers, S slots of all ranks, R ranks, P slots of a rank, A curves, N tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simulations import arithmetic
from simulations.deployment import BYTES, Deployment
from simulations.hardware.calibration import Calibration
from simulations.times.group_sums import group_sums

Array = NDArray[Any]
Warn = Callable[[str], None]

MOST_TOKENS = 1 << 24
LAUNCHES = 3
"""Gate and up of all experts, activation, down of all experts."""


class ExpertTimes:
    """`num_parts`: into how many micro-batches each expert's tokens are divided."""

    def __init__(
        self, deployment: Deployment, calibration: Calibration, warn: Warn, num_parts: int = 1
    ) -> None:
        model = deployment.model
        self._deployment, self._calibration, self._warn = deployment, calibration, warn
        self._num_parts = num_parts
        shape = f"{model.hidden_size}x{model.expert_intermediate_size}"
        self._name = f"active_experts/{deployment.weights}/{shape}"
        self._experts_A = np.arange(deployment.slots_per_rank + 1)
        if self._name not in calibration.tables:
            self._name = f"grouped_gemm/{deployment.weights}/{shape}"
            self._experts_A = self._experts_A[-1:]
        self._table = calibration.tables.get(self._name)
        if self._table is not None and not self._table.covers(experts=deployment.slots_per_rank):
            warn(f"extrapolated: experts of a rank beyond table {self._name}")
        self._seconds_AN = self._curves(np.arange(1024))

    def by_rank(self, slot_tokens_BLS: Array) -> Array:
        """float32 [B, L, R]: all parts together. Fractions of tokens count as whole ones."""
        index_BLS = slot_tokens_BLS
        if index_BLS.dtype.kind == "f":
            index_BLS = np.ceil(index_BLS).astype(np.int32)
        self._reach(int(index_BLS.max(initial=0)))
        curves_AN = self._seconds_AN
        if len(curves_AN) > 1 and index_BLS.size and index_BLS.min() > 0:
            curves_AN = curves_AN[-1:]  # all have tokens, which is so most of the time
        if len(curves_AN) > 1:
            active_BLR = group_sums(index_BLS > 0, self._deployment.slots_per_rank).astype(np.int32)
            starts_BLR = active_BLR * np.int32(curves_AN.shape[1])
            index_BLS = index_BLS + starts_BLR.repeat(self._deployment.slots_per_rank, axis=-1)
        seconds_BLS = curves_AN.take(index_BLS, mode="clip")
        by_rank_BLR = group_sums(seconds_BLS, self._deployment.slots_per_rank)
        return by_rank_BLR + np.float32(self._launches())

    def _reach(self, tokens: int) -> None:
        """Have the cost of so many tokens in the curve. Raises ValueError beyond MOST_TOKENS."""
        if tokens > MOST_TOKENS:
            raise ValueError(f"at most {MOST_TOKENS:,} tokens of one expert, got {tokens:,}")
        if tokens >= self._seconds_AN.shape[1]:
            self._seconds_AN = self._curves(np.arange(2 * tokens))
        part = -(-tokens // self._num_parts)
        if self._table is not None and part > self._table.axes["tokens_per_expert"][-1]:
            self._warn(f"extrapolated: tokens beyond table {self._name}")

    def _launches(self) -> float:
        if self._table is not None:
            return 0.0  # measured along
        return (
            self._num_parts * LAUNCHES * self._calibration.gemm[self._deployment.weights].overhead_s
        )

    def _curves(self, tokens_N: Array) -> Array:
        """Seconds of one expert with so many tokens, in all parts: float32 [A, N]."""
        part_N = np.ceil(tokens_N / self._num_parts)
        one = self._measured if self._table is not None else self._roofline
        return (np.atleast_2d(one(part_N)) * (part_N > 0) * self._num_parts).astype(np.float32)

    def _measured(self, tokens_N: Array) -> Array:
        """[A, N]: an equal share of what so many experts take together."""
        assert self._table is not None
        experts_A1 = np.maximum(self._experts_A, 1)[:, None]
        least_one_N = np.maximum(tokens_N, 1)
        return self._table.at(experts=experts_A1, tokens_per_expert=least_one_N) / experts_A1

    def _roofline(self, tokens_N: Array) -> Array:
        model, calibration = self._deployment.model, self._calibration
        dtype = self._deployment.weights
        gate_up, down = arithmetic.routed_expert(model)
        tile = calibration.gemm[dtype].tile
        flop_N = np.ceil(tokens_N / tile) * tile * (gate_up.flop_per_row + down.flop_per_row)
        # Rows in and between the products in the weights' dtype, out of them in bfloat16; the
        # activation reads what the first product wrote.
        in_bytes = (gate_up.k + 2 * down.k) * BYTES[dtype]
        out_bytes = (2 * gate_up.n + down.n) * 2
        bytes_N = self._deployment.expert_bytes + tokens_N * (in_bytes + out_bytes)
        return np.maximum(
            flop_N / calibration.peak_flops[dtype], bytes_N / calibration.memory_bandwidth
        )
