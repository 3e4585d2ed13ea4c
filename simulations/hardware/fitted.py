"""From measurements of a machine to the values of its calibration: constants fitted, tables checked."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np

from cluster.model.config import ModelConfig
from simulations.hardware import fit
from simulations.hardware.calibration import Calibration
from simulations.hardware.fidelity import fidelity
from simulations.hardware.fit import rounded
from simulations.times.attention_times import core_tables

Say = Callable[[str], None]

_SKEWS = "skewed_experts_s/"


def fitted(
    model: ModelConfig,
    found: Mapping[str, Any],
    *,
    name: str,
    command: str,
    notes: str,
    dtypes: Sequence[Any],
    others: Mapping[str, Any],
    say: Say,
) -> dict[str, Any]:
    say("fitting")
    values: dict[str, Any] = {
        "version": 1,
        "name": name,
        "provenance": {
            "hardware": found["hardware"],
            "software": found["software"],
            "date": datetime.now(UTC).date().isoformat(),
            "source": "measured by expertmesh calibrate",
            "command": command,
            "clocks": found["clocks"],
            "notes": notes,
        },
        "memory_bytes": found["memory_bytes"],
        "memory_bandwidth": rounded(_bandwidth(found)),
        "peak_flops": dict.fromkeys(dtypes, 1.0),
        "gemm": {dtype: {"overhead_s": 0.0, "tile": 1} for dtype in dtypes},
        "attention": {},
        "tables": found["tables"],
        **others,
        "measured": found["measured"],
    }
    _fit(model, values, dtypes)
    calibration = Calibration.from_json(json.dumps(values), name)
    skews = {
        key.removeprefix(_SKEWS): seconds
        for key, seconds in found["measured"].items()
        if key.startswith(_SKEWS)
    }
    values["fidelity"] = fidelity(model, calibration, skews)
    return values


def _bandwidth(found: Mapping[str, Any]) -> float:
    """The best of a copy, a reduction, and reading a large weight for a single row."""
    best = max(found["measured"]["memory_bandwidth"].values())
    for table_name, table in found["tables"].items():
        kind, _, shape = table_name.partition("/bfloat16/")
        if kind == "gemm" and table["axes"]["tokens"][0] == 1:
            best = max(best, 2 * np.prod([int(x) for x in shape.split("x")]) / table["values"][0])
    return float(best)


def _fit(model: ModelConfig, values: dict[str, Any], dtypes: Sequence[Any]) -> None:
    """Fill in "peak_flops", "gemm" and "attention" from the tables."""

    def calibration() -> Calibration:
        return Calibration.from_json(json.dumps(values), values["name"])

    tables = calibration().tables
    measured = {dtype: fit.products(tables, dtype) for dtype in dtypes}
    values["peak_flops"] = {dtype: rounded(fit.peak_flops(measured[dtype])) for dtype in dtypes}
    for dtype in dtypes:
        launch = fit.fit_launch(model, calibration(), measured[dtype], dtype)
        values["gemm"][dtype] = {"overhead_s": rounded(launch.overhead_s), "tile": launch.tile}
    decode, prefill = (tables.get(key) for key in core_tables(model))
    attention = fit.fit_attention(model, calibration(), decode, prefill)
    values["attention"] |= {key: rounded(x) for key, x in attention.items()}


def ranges(
    tokens: tuple[int, ...], contexts: tuple[int, ...], ranks: tuple[int, int]
) -> dict[str, list[int]]:
    return {
        "tokens": [tokens[0], tokens[-1]],
        "context": [contexts[0], contexts[-1]],
        "ranks": list(ranks),
    }
