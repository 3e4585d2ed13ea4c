"""A calibration file of the machine at hand: measure, fit, check, write.

On a GPU a single rank is measured; the links between nodes, which it does not have, are taken from a
calibration of published figures, and the file says so.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from cluster.model.config import ModelConfig
from simulations.hardware import fit
from simulations.hardware.calibration import Calibration
from simulations.hardware.cpu_tables import core_tables
from simulations.hardware.fidelity import fidelity
from simulations.hardware.fit import fit_link, rounded
from simulations.presets import load_model
from simulations.whole_file import write_whole

Say = Callable[[str], None]

LINKS_FROM = "h100-published"
_SKEWS = "skewed_experts_s/"


class NoGpuError(RuntimeError):
    """There is no GPU, or not what it takes to measure one."""


def gpu_calibration(
    model: ModelConfig, *, name: str, command: str, quick: bool, say: Say
) -> dict[str, Any]:
    """The calibration of GPU 0 (and its link to GPU 1) at this model's sizes. Raises NoGpuError."""
    import torch

    if not torch.cuda.is_available():
        raise NoGpuError("no GPU that torch can use: choose --device cpu")
    try:
        from simulations.hardware import measure_gpu
    except ImportError as error:
        raise NoGpuError(f"measuring a GPU needs Triton: {error}") from error
    sizes = measure_gpu.Sizes.quick() if quick else measure_gpu.Sizes()
    found = measure_gpu.measure(model, sizes, say)
    notes = ["bytes between nodes and the overlap of communication: as in " + LINKS_FROM]
    borrowed = Calibration.named(LINKS_FROM)
    links = {where: {"alpha_s": x.alpha_s, "beta": x.beta} for where, x in borrowed.links.items()}
    if "link" in found["measured"]:
        times = found["measured"]["link"]
        links["node"] = fit_link(times["bytes"], times["both_ways_s"])
        notes.append("links inside a node: peer copies, both ways at once")
    return _calibration(
        model,
        found,
        name=name,
        command=command,
        notes="; ".join(notes),
        dtypes=("bfloat16", "float8"),
        others={
            "links": links,
            "overheads": {"step_s": borrowed.step_s, "layer_s": 0.0},
            "overlap": {"sm_share": borrowed.sm_share, "supports_two_batch": True},
            "range": _ranges(sizes.rows, sizes.contexts, (1, 256)),
        },
        say=say,
    )


def cpu_calibration(
    model: ModelConfig, *, name: str, command: str, quick: bool, say: Say, sizes: Any = None
) -> dict[str, Any]:
    """The calibration of ranks of this machine, as many at once as are measured together.

    sizes: a `measure_cpu.Sizes`; None: as `quick` says.
    """
    from simulations.hardware import measure_cpu
    from simulations.hardware.step_check import check_step, fit_overheads

    sizes = sizes or (measure_cpu.Sizes.quick() if quick else measure_cpu.Sizes())
    found = measure_cpu.measure(model, sizes, say)
    values = _calibration(
        model,
        found,
        name=name,
        command=command,
        notes=found["notes"],
        dtypes=("bfloat16",),
        others={
            "links": found["links"],
            "dispatch": found["dispatch"],
            "combine": found["combine"],
            "overheads": {"step_s": 0.0, "layer_s": 0.0},
            "overlap": {"sm_share": 0.0, "supports_two_batch": False, "pipelined_stages": False},
            "range": _ranges(sizes.rows, sizes.contexts, (1, measure_cpu.LAYOUT.world_size)),
        },
        say=say,
    )
    say("steps of the bundled model")
    values["overheads"] = fit_overheads(
        Calibration.from_json(json.dumps(values), name), sizes.steps
    )
    if model == load_model("mosaic"):
        calibration = Calibration.from_json(json.dumps(values), name)
        values["measured"]["step"] = [
            check_step(calibration, sequences, sizes.steps) for sequences in sizes.check_sequences
        ]
    return values


def write(path: Path, values: Mapping[str, Any]) -> Calibration:
    """Check, then put in place at once, so that there is never half a file. Raises OSError."""
    text = json.dumps(values, indent=1)
    text = re.sub(r"\[[^\[\]{}]*\]", _on_one_line, text) + "\n"
    calibration = Calibration.from_json(text, str(path))
    write_whole(path, text)
    return calibration


def _on_one_line(numbers: re.Match[str]) -> str:
    return re.sub(r"\s+", " ", numbers[0]).replace("[ ", "[").replace(" ]", "]")


def _calibration(
    model: ModelConfig,
    found: Mapping[str, Any],
    *,
    name: str,
    command: str,
    notes: str,
    dtypes: tuple[Any, ...],
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


def _fit(model: ModelConfig, values: dict[str, Any], dtypes: tuple[Any, ...]) -> None:
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
    values["attention"] = {key: rounded(x) for key, x in attention.items()}


def _ranges(
    tokens: tuple[int, ...], contexts: tuple[int, ...], ranks: tuple[int, int]
) -> dict[str, list[int]]:
    return {
        "tokens": [tokens[0], tokens[-1]],
        "context": [contexts[0], contexts[-1]],
        "ranks": list(ranks),
    }
