"""What our own kernels do on the current GPU, and between two of them if there are."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from cluster.model.config import ModelConfig
from simulations.deployment import ComputeDtype
from simulations.hardware.gpu_exchange import exchange_times
from simulations.hardware.gpu_grid import Grid, Part
from simulations.hardware.gpu_links import link_times
from simulations.hardware.gpu_meter import GraphMeter, Meter
from simulations.hardware.gpu_products import skewed_counts
from simulations.hardware.gpu_step_check import measured_steps
from simulations.hardware.own_compile import compile_kernels
from simulations.hardware.own_experts import OwnExperts
from simulations.hardware.own_grids import Models, OwnSizes, dtypes_of, grids


def own_parts(models: Models, sizes: OwnSizes) -> list[tuple[str, Part]]:
    """Kernels compile first. The last model's layers are run, the first one's rows exchanged."""
    meter = GraphMeter(device=torch.device("cuda", torch.cuda.current_device()))
    parts: list[tuple[str, Part]] = [("compiling kernels", lambda: _compiled(models, sizes))]
    parts += [(grid.name, partial(_table, grid)) for grid in grids(models, sizes, meter)]
    parts.append(("skewed counts", lambda: ({}, skewed_seconds(models[0], sizes, meter))))
    for dtype in dtypes_of(models[-1]):
        parts.append((f"{dtype} layers", partial(_steps, models[-1], dtype)))
    if torch.cuda.device_count() > 1:
        parts.append(("copies", lambda: ({}, {"link": link_times()})))
        parts.append(("exchange", lambda: ({}, {"exchange": exchange_times(models[0], meter)})))
    return parts


def _compiled(models: Models, sizes: OwnSizes) -> tuple[dict[str, Any], dict[str, Any]]:
    compile_kernels(models, sizes)
    return {}, {}


def _table(grid: Grid) -> tuple[dict[str, Any], dict[str, Any]]:
    return {grid.name: grid.table()}, {}


def _steps(model: ModelConfig, dtype: ComputeDtype) -> tuple[dict[str, Any], dict[str, Any]]:
    return {}, {f"layers/{dtype}": measured_steps(model, dtype)}


def skewed_seconds(model: ModelConfig, sizes: OwnSizes, meter: Meter) -> dict[str, Any]:
    """{"skewed_experts_s/<dtype>": {counts: seconds}}: to see what the cost model makes of them."""
    found: dict[str, Any] = {}
    for dtype in dtypes_of(model):
        own = OwnExperts(model, dtype, meter)
        found[f"skewed_experts_s/{dtype}"] = {
            ",".join(map(str, counts)): float(f"{own.counted(counts).p50:.4g}")
            for number, mean in sizes.skews
            for counts in skewed_counts(number, mean)
        }
    return found
