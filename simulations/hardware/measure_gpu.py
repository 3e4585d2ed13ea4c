"""All measurements of one GPU (and of the link to a second one, if there is one)."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch

from cluster.model.config import ModelConfig
from simulations.hardware import gpu_rows
from simulations.hardware.gpu_grid import Part
from simulations.hardware.gpu_timing import ClockLog, warm_up
from simulations.hardware.measure_library import LibrarySizes, library_parts
from simulations.hardware.own_grids import OwnSizes
from simulations.hardware.own_kernels import own_parts

Say = Callable[[str], None]
Sizes = OwnSizes | LibrarySizes


def sizes_for(kernels: str, *, quick: bool) -> Sizes:
    """What is measured of "ours" or of "library"; `quick` is for trying the command."""
    kind = OwnSizes if kernels == "ours" else LibrarySizes
    return kind.quick() if quick else kind()


def measure(models: Sequence[ModelConfig], sizes: Sizes, say: Say) -> dict[str, Any]:
    """{"tables", "measured", "memory_bytes", "hardware", "software", "clocks"}.

    sizes: those of our kernels, or those of the library's, which take one model. say: told the name of
    each part as it starts.
    """
    torch.cuda.init()
    tables: dict[str, Any] = {}
    measured: dict[str, Any] = {}
    with ClockLog() as clocks, torch.inference_mode():
        warm_up()
        for name, part in _parts(models, sizes):
            say(name)
            found, others = part()
            tables |= found
            measured |= others
            torch.cuda.empty_cache()
    properties = torch.cuda.get_device_properties(0)
    return {
        "tables": tables,
        "measured": measured,
        "memory_bytes": float(properties.total_memory),
        "hardware": f"{torch.cuda.device_count()} x {properties.name}",
        "software": _software(),
        "clocks": clocks.summary(),
    }


def _parts(models: Sequence[ModelConfig], sizes: Sizes) -> list[tuple[str, Part]]:
    memory = ("memory and launches", _memory)
    if isinstance(sizes, OwnSizes):
        return [memory, *own_parts(models, sizes)]
    return [memory, *library_parts(models[0], sizes)]


def _memory() -> tuple[dict[str, Any], dict[str, Any]]:
    bandwidth, launches = gpu_rows.memory_bandwidth(), gpu_rows.launch_seconds()
    return {}, {"memory_bandwidth": bandwidth, "launch_s": launches}


def _software() -> dict[str, str]:
    versions = {"torch": torch.__version__, "cuda": str(torch.version.cuda)}
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    with suppress(OSError, subprocess.CalledProcessError):
        found = subprocess.run(query, capture_output=True, text=True, check=True)
        versions["driver"] = found.stdout.split()[0]
    with suppress(ImportError):
        import triton

        versions["triton"] = triton.__version__
    return versions
