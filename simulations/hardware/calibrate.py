"""A calibration file of the machine at hand: measure, fit, check, write.

On a GPU a single rank is measured; the links between nodes, which it does not have, are taken from a
calibration of published figures, and the file says so.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cluster.model.config import ModelConfig
from simulations.deployment import BYTES
from simulations.hardware.calibration import NAMES, Calibration
from simulations.hardware.fit import fit_exchange, fit_link
from simulations.hardware.fitted import Say, fitted, ranges
from simulations.presets import load_model
from simulations.times.network import Link
from simulations.whole_file import write_whole

LINKS_FROM = "h100-published"
EXCHANGE_FROM = "h200-ours"
_LAYERS = "layers/"


class NoGpuError(RuntimeError):
    """There is no GPU, or not what it takes to measure one."""


def gpu_calibration(
    models: Sequence[ModelConfig],
    kernels: str,
    *,
    name: str,
    command: str,
    quick: bool,
    say: Say,
) -> dict[str, Any]:
    """The calibration of GPU 0 (and of what is between it and GPU 1) at these models' sizes.

    kernels: "ours", or "library" for PyTorch's, of one model. Raises NoGpuError.
    """
    import torch

    if not torch.cuda.is_available():
        raise NoGpuError("no GPU that torch can use: choose --device cpu")
    try:
        from simulations.hardware import measure_gpu
    except ImportError as error:
        raise NoGpuError(f"measuring a GPU needs Triton: {error}") from error
    sizes = measure_gpu.sizes_for(kernels, quick=quick)
    found = measure_gpu.measure(models, sizes, say)
    borrowed, notes = borrowed_values(found["measured"], kernels)
    dtypes = [dtype for dtype in BYTES if any(f"gemm/{dtype}/" in name for name in found["tables"])]
    borrowed["attention"] = {"absorbed_prompts": kernels == "ours"}
    values = fitted(
        models[0],
        found,
        name=name,
        command=command,
        notes="; ".join(notes),
        dtypes=dtypes,
        others={**borrowed, "range": ranges(sizes.rows, sizes.contexts, (1, 256))},
        say=say,
    )
    return with_steps(models[-1], values) if kernels == "ours" else values


def borrowed_values(measured: Mapping[str, Any], kernels: str) -> tuple[dict[str, Any], list[str]]:
    """Links, overheads and overlap, as far as they were measured; notes say what was not.

    Without a second GPU our exchange is taken for that of the pair whose calibration comes with us.
    """
    published = Calibration.named(LINKS_FROM)
    links = _links_json(published.links)
    values: dict[str, Any] = {
        "links": links,
        "overheads": {"step_s": published.step_s, "layer_s": 0.0},
        "overlap": {"sm_share": published.sm_share, "supports_two_batch": True},
    }
    notes = [f"kernels: {kernels}"]
    notes.append(f"bytes between nodes and the overlap of communication: as in {LINKS_FROM}")
    if "link" in measured:
        links["node"] = fit_link(measured["link"]["bytes"], measured["link"]["both_ways_s"])
        notes.append("links inside a node: peer copies, both ways at once")
    if "exchange" in measured:
        values |= fit_exchange(measured["exchange"])
        notes.append("dispatch and combine inside a node: between two GPUs, combine in integers")
    elif kernels == "ours" and EXCHANGE_FROM in NAMES:
        pair = Calibration.named(EXCHANGE_FROM)
        ways = (("links", pair.links), ("dispatch", pair.dispatch), ("combine", pair.combine))
        for key, of_pair in ways:
            values[key] = {**values.get(key, {}), "node": _links_json(of_pair)["node"]}
        notes.append(f"links, dispatch and combine inside a node: as in {EXCHANGE_FROM}")
    return values, notes


def _links_json(links: Mapping[str, Link]) -> dict[str, Any]:
    return {where: {"alpha_s": link.alpha_s, "beta": link.beta} for where, link in links.items()}


def with_steps(model: ModelConfig, values: dict[str, Any]) -> dict[str, Any]:
    """What belongs to no operation, from measured steps of layers; and how well these are predicted."""
    from simulations.hardware.gpu_step_check import checks, overheads

    steps = {
        key.removeprefix(_LAYERS): rows
        for key, rows in values["measured"].items()
        if key.startswith(_LAYERS)
    }
    if not steps:
        return values
    found = [overheads(model, values, dtype, rows) for dtype, rows in steps.items()]
    values["overheads"] = {key: min(x[key] for x in found) for key in ("step_s", "layer_s")}
    values["measured"]["layer"] = [
        row for dtype, rows in steps.items() for row in checks(model, values, dtype, rows)
    ]
    return values


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
    values = fitted(
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
            "range": ranges(sizes.rows, sizes.contexts, (1, measure_cpu.LAYOUT.world_size)),
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
