"""Seconds of a model's operations on one rank: measured where there is a table, else a roofline.

    seconds = overhead + max(FLOP / peak, bytes / bandwidth)

FLOP count rows rounded up to the tile of the product; bytes are the weights', once, and the
activations'. All functions work on arrays of any shape, and nothing to do takes no time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simulations import arithmetic
from simulations.arithmetic import Gemm
from simulations.deployment import BYTES, Deployment
from simulations.hardware.calibration import Calibration
from simulations.times.attention_times import AttentionTimes
from simulations.times.step_work import StepWork

Array = NDArray[Any]
Warn = Callable[[str], None]

NORM_BYTES = 4 * 2 + 3
"""Per channel, before each of attention and MLP: residual and output read, residual and normalised
row written in bfloat16; the row read again and written in float8."""


class OpTimes:
    """Raises ValueError if the calibration does not know the weights' dtype."""

    def __init__(self, deployment: Deployment, calibration: Calibration, warn: Warn) -> None:
        if deployment.weights not in calibration.peak_flops:
            raise ValueError(
                f"calibration {calibration.name} has no {deployment.weights}: choose weights from "
                f"{', '.join(calibration.peak_flops)}"
            )
        model, size = deployment.model, deployment.topology.tensor_parallel_size
        self._deployment, self._calibration, self._warn = deployment, calibration, warn
        self._tp_size = size
        self._attention = arithmetic.attention(model, size)
        self._dense = arithmetic.dense_mlp(model, size) if model.dense_intermediate_size else ()
        self._shared = arithmetic.shared_expert(model)
        self._gate, self._head = arithmetic.gate(model), arithmetic.head(model, size)
        self.core = AttentionTimes(deployment, calibration, warn).core

    def before_core(self, work: StepWork) -> Array:
        """Gathering the replica's rows, norm, and the projections to queries and keys."""
        rows = work.tokens_BD
        attention = self._attention
        plain = work.has_prompts and not self._calibration.absorbed_prompts
        gemms = attention.before_prefill if plain else attention.before
        name = f"elementwise/attention/{self._deployment.model.hidden_size}"
        seconds = self._measured(name, rows, self._norm) + self._gather(rows)
        return np.asarray(seconds + self._all(gemms, rows))

    def after_core(self, work: StepWork) -> Array:
        """The projections of the output, and its sum over the replica's ranks."""
        rows = work.tokens_BD
        attention = self._attention
        plain = work.has_prompts and not self._calibration.absorbed_prompts
        gemms = attention.after_prefill if plain else attention.after
        return np.asarray(self._all(gemms, rows) + self._gather(rows))

    def attention(self, work: StepWork) -> Array:
        return np.asarray(self.before_core(work) + self.core(work) + self.after_core(work))

    def gate(self, work: StepWork) -> Array:
        """On a rank's own rows, with the norm before it."""
        rows = work.tokens_BD / self._tp_size
        name = f"gate/{self._gate.n}x{self._gate.k}"
        return self._measured(
            name, rows, lambda rows: self._norm(rows) + self.gemm(self._gate, rows, "bfloat16")
        )

    def shared(self, work: StepWork) -> Array:
        """Its products; by a table, what it adds to what it runs beside."""
        model, rows = self._deployment.model, work.tokens_BD / self._tp_size
        shape = f"{model.hidden_size}x{model.shared_intermediate_size}"
        name = f"shared_expert/{self._deployment.weights}/{shape}"
        return self._measured(name, rows, lambda rows: self._all(self._shared, rows))

    def dense(self, work: StepWork) -> Array:
        """The MLP of a layer without experts."""
        rows = work.tokens_BD
        seconds = self._norm(rows) + 2 * self._gather(rows)
        return np.asarray(seconds + self._all(self._dense, rows))

    def head(self, work: StepWork) -> Array:
        """Logits, and their way to the replica's first rank."""
        rows = work.logits_BD
        elsewhere = rows * (self._head.n * (self._tp_size - 1) * BYTES["bfloat16"])
        seconds = self._calibration.links["node"].seconds(elsewhere)
        return np.asarray(seconds + self.gemm(self._head, rows, "bfloat16"))

    def gemm(self, gemm: Gemm, rows: Array, dtype: str) -> Array:
        """One product, or as many as it counts."""
        shape = f"{gemm.n}x{gemm.k}"
        name = f"gemm/{dtype}/{shape}" if gemm.count == 1 else f"bmm/{dtype}/{gemm.count}/{shape}"
        return self._measured(name, rows, lambda rows: self._roofline(gemm, rows, dtype))

    def _measured(self, name: str, rows: Array, otherwise: Callable[[Array], Array]) -> Array:
        """By a table of tokens, if there is one of that name."""
        table = self._calibration.tables.get(name)
        if table is None:
            return np.asarray(otherwise(rows))
        least_one = np.maximum(rows, 1)
        if not table.covers(tokens=least_one):
            self._warn(f"extrapolated: tokens beyond table {name}")
        return np.asarray(table.at(tokens=least_one) * (rows > 0))

    def _roofline(self, gemm: Gemm, rows: Array, dtype: str) -> Array:
        calibration = self._calibration
        launch = calibration.gemm[dtype]
        tiles = np.ceil(rows / launch.tile) * launch.tile
        num_bytes = gemm.params * BYTES[dtype] + rows * (gemm.values_per_row * BYTES["bfloat16"])
        seconds = np.maximum(
            tiles * (gemm.flop_per_row / calibration.peak_flops[dtype]),
            num_bytes / calibration.memory_bandwidth,
        )
        return np.asarray((seconds + launch.overhead_s) * (rows > 0))

    def _all(self, gemms: Iterable[Gemm], rows: Array) -> Array:
        """Products of each head are in bfloat16, as in DeepSeek's own kernels."""
        total = np.zeros_like(rows)
        for gemm in gemms:
            dtype = self._deployment.weights if gemm.count == 1 else "bfloat16"
            total = total + self.gemm(gemm, rows, dtype)
        return total

    def _norm(self, rows: Array) -> Array:
        per_row = self._deployment.model.hidden_size * NORM_BYTES
        return np.asarray(rows * (per_row / self._calibration.memory_bandwidth))

    def _gather(self, rows: Array) -> Array:
        """An all-gather or a reduce-scatter of the replica's rows over its ranks, in bfloat16."""
        share = (self._tp_size - 1) / self._tp_size
        per_row = share * self._deployment.model.hidden_size * BYTES["bfloat16"]
        return self._calibration.links["node"].seconds(rows * per_row)
