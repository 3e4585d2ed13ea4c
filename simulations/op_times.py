"""Seconds of a model's operations on one rank: measured where there is a table, else a roofline.

    seconds = overhead + max(FLOP / peak, bytes / bandwidth)

FLOP count rows rounded up to the tile of the product; bytes are the weights', once, and the
activations'. All functions work on arrays of any shape.
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
from simulations.step_work import StepWork

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

    def before_core(self, work: StepWork) -> Array:
        """Gathering the replica's rows, norm, and the projections to queries and keys."""
        rows = work.tokens_BD
        seconds = self._norm(rows) + self._gather(rows)
        return np.asarray(seconds + self._all(self._attention.before, rows))

    def core(self, work: StepWork) -> Array:
        """Scores, softmax and weighted sum over keys."""
        attention, calibration = self._attention, self._calibration
        kv_bytes = attention.values_per_key * BYTES[self._deployment.kv_dtype]
        decode_pairs = (
            np.minimum(work.pairs_BD, work.kv_tokens_BD) if work.has_prompts else work.pairs_BD
        )
        seconds = np.maximum(
            decode_pairs * (attention.flop_per_pair_decode / calibration.decode_flops),
            work.kv_tokens_BD * (kv_bytes / calibration.memory_bandwidth),
        )
        if work.has_prompts:
            flop = (work.pairs_BD - decode_pairs) * attention.flop_per_pair_prefill
            seconds = seconds + flop / calibration.prefill_flops
        return np.asarray(seconds + calibration.attention_overhead_s * (work.pairs_BD > 0))

    def after_core(self, work: StepWork) -> Array:
        """The projections of the output, and its sum over the replica's ranks."""
        rows = work.tokens_BD
        return self._all(self._attention.after, rows) + self._gather(rows)

    def gate(self, work: StepWork) -> Array:
        """On a rank's own rows, with the norm before it."""
        rows = work.tokens_BD / self._tp_size
        return self._norm(rows) + self.gemm(self._gate, rows, "bfloat16")

    def shared(self, work: StepWork) -> Array:
        return self._all(self._shared, work.tokens_BD / self._tp_size)

    def dense(self, work: StepWork) -> Array:
        """The MLP of a layer without experts."""
        rows = work.tokens_BD
        return self._norm(rows) + 2 * self._gather(rows) + self._all(self._dense, rows)

    def head(self, work: StepWork) -> Array:
        rows = work.logits_BD
        vocabulary = self._head.n * (self._tp_size - 1) * 2
        link = self._calibration.links["node"]
        return self.gemm(self._head, rows, "bfloat16") + link.seconds(rows * vocabulary)

    def gemm(self, gemm: Gemm, rows: Array, dtype: str) -> Array:
        """One product; no rows take no time."""
        calibration = self._calibration
        table = calibration.tables.get(f"gemm/{dtype}/{gemm.n}x{gemm.k}")
        if table is not None and gemm.count == 1:
            if rows.size and not table.covers(tokens=np.maximum(rows, 1)):
                self._warn(
                    f"extrapolated: product {gemm.n}x{gemm.k} in {dtype}, {rows.max():g} tokens"
                )
            return np.asarray(table.at(tokens=np.maximum(rows, 1)) * (rows > 0))
        launch = calibration.gemm[dtype]
        tiles = np.ceil(rows / launch.tile) * launch.tile
        num_bytes = gemm.params * BYTES[dtype] + rows * (gemm.values_per_row * 2)
        seconds = np.maximum(
            tiles * (gemm.flop_per_row / calibration.peak_flops[dtype]),
            num_bytes / calibration.memory_bandwidth,
        )
        return np.asarray((seconds + launch.overhead_s) * (rows > 0))

    def _all(self, gemms: Iterable[Gemm], rows: Array) -> Array:
        dtype = self._deployment.weights
        return sum((self.gemm(gemm, rows, dtype) for gemm in gemms), np.zeros_like(rows))

    def _norm(self, rows: Array) -> Array:
        per_row = self._deployment.model.hidden_size * NORM_BYTES
        return rows * (per_row / self._calibration.memory_bandwidth)

    def _gather(self, rows: Array) -> Array:
        """An all-gather or a reduce-scatter of the replica's rows over its ranks, in bfloat16."""
        share = (self._tp_size - 1) / self._tp_size
        num_bytes = rows * (share * self._deployment.model.hidden_size * 2)
        return self._calibration.links["node"].seconds(num_bytes)
