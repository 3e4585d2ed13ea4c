"""How well a calibration predicts what it was not told: every third measurement held out.

Errors are |predicted / measured - 1|; "median" and "worst" over the points held out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cluster.model.config import ModelConfig
from comms.topology import Topology
from simulations.arithmetic import Gemm
from simulations.deployment import ComputeDtype, Deployment
from simulations.hardware import fit
from simulations.hardware.calibration import Calibration
from simulations.hardware.tables import Table
from simulations.times.expert_times import ExpertTimes

Floats = NDArray[np.float64]


def fidelity(
    model: ModelConfig, calibration: Calibration, skews: Mapping[str, Mapping[str, float]]
) -> dict[str, Any]:
    """{what: {"points", "median", "worst"}}.

    skews: {dtype: {"4,0,0,0": seconds}}, experts' times by the numbers of their rows.
    """
    found: dict[str, Floats] = {}
    tables = calibration.tables
    groups = {
        "sizes between those measured: products": ("gemm/", "bmm/"),
        "sizes between those measured: experts": (
            "grouped_gemm/",
            "active_experts/",
            "shared_expert/",
        ),
        "sizes between those measured: attention": (
            "mla_decode/",
            "gqa_decode/",
            "attention_prefill/",
        ),
        "sizes between those measured: rows": ("elementwise/", "gate/", "rows/"),
    }
    for what, prefixes in groups.items():
        some = [table for name, table in tables.items() if name.startswith(prefixes)]
        found[what] = _joined(_between(table) for table in some)
    for dtype in calibration.peak_flops:
        found[f"shapes without a table: {dtype} products"] = _shapes(model, calibration, dtype)  # type: ignore[arg-type]
    for dtype, seconds in skews.items():
        found[f"skewed counts: {dtype} experts"] = _skewed(model, calibration, dtype, seconds)  # type: ignore[arg-type]
    return {what: _summary(errors) for what, errors in found.items() if len(errors)}


def _between(table: Table) -> Floats:
    """Of every third point of each axis, its first and last kept, by interpolation of the rest."""
    errors = []
    for name, points in table.axes.items():
        held = range(1, len(points) - 1, 3)
        if not held:
            continue
        grid = dict(zip(table.axes, np.meshgrid(*table.axes.values(), indexing="ij"), strict=True))
        predicted = table.without(name, held).at(**grid)
        axis = list(table.axes).index(name)
        errors.append(np.abs(predicted / table.values - 1).take(list(held), axis=axis).ravel())
    return _joined(errors)


def _shapes(model: ModelConfig, calibration: Calibration, dtype: ComputeDtype) -> Floats:
    """Of every third product, by the formula with constants fitted to the others."""
    measured = fit.products(calibration.tables, dtype)
    errors = []
    for first in range(3 if len(measured) > 3 else 0):
        held: dict[Gemm, Table] = dict(list(measured.items())[first::3])
        others = {gemm: table for gemm, table in measured.items() if gemm not in held}
        peaks = {**calibration.peak_flops, dtype: fit.peak_flops(others)}
        known = replace(calibration, peak_flops=peaks, tables={})
        launch = fit.fit_launch(model, known, others, dtype)
        known = replace(known, gemm={**known.gemm, dtype: launch})
        predicted = fit.predict_products(model, known, held, dtype)
        errors.append(np.abs(predicted / fit.seconds_of(held.values()) - 1))
    return _joined(errors)


def _skewed(
    model: ModelConfig, calibration: Calibration, dtype: ComputeDtype, seconds: Mapping[str, float]
) -> Floats:
    """The cost model's sum over a rank's experts, for counts that differ."""
    errors = []
    for text, measured in seconds.items():
        counts = np.array([int(x) for x in text.split(",")])
        if model.num_experts % len(counts):
            continue
        topology = Topology(num_nodes=1, ranks_per_node=model.num_experts // len(counts))
        deployment = Deployment(model=model, topology=topology, weights=dtype)
        slots_BLS = np.zeros((1, 1, model.num_experts), dtype=np.int64)
        slots_BLS[0, 0, : len(counts)] = counts
        experts = ExpertTimes(deployment, calibration, lambda _warning: None)
        errors.append(abs(float(experts.by_rank(slots_BLS)[0, 0, 0]) / measured - 1))
    return np.array(errors)


def _joined(parts: Iterable[Floats]) -> Floats:
    return np.concatenate([np.zeros(0), *parts])


def _summary(errors: Floats) -> dict[str, Any]:
    return {
        "points": len(errors),
        "median": round(float(np.median(errors)), 4),
        "worst": round(float(errors.max()), 4),
    }
