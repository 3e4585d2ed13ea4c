"""Every table of our own kernels at the sizes of some models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from cluster.model.config import ModelConfig
from experts.kernels.types import BLOCK
from simulations.deployment import ComputeDtype
from simulations.hardware.gpu_grid import Grid
from simulations.hardware.gpu_meter import Meter
from simulations.hardware.own_attention import decode_grid, prefill_grid
from simulations.hardware.own_experts import expert_grid
from simulations.hardware.own_products import product_grids
from simulations.hardware.own_rows import row_grids
from simulations.hardware.own_shared import shared_grid

Models = Sequence[ModelConfig]

SKEWS = ((4, 64), (8, 16), (8, 128), (32, 32))  # experts of a rank, mean rows of each


@dataclass(frozen=True, kw_only=True)
class OwnSizes:
    """Few points each: they lie where tiles change, and a machine is not had for long."""

    rows: tuple[int, ...] = (1, 8, 32, 64, 128, 256, 512, 2048, 8192)
    experts: tuple[int, ...] = (1, 4, 16, 64)
    tokens_per_expert: tuple[int, ...] = (1, 4, 16, 64, 128, 256, 512, 2048)
    sequences: tuple[int, ...] = (1, 8, 32, 128, 512)
    contexts: tuple[int, ...] = (128, 1024, 4096, 16384)
    prompts: tuple[int, ...] = (128, 512, 2048, 4096)
    skews: tuple[tuple[int, int], ...] = SKEWS

    @staticmethod
    def quick() -> OwnSizes:
        return OwnSizes(
            rows=(1, 16, 128, 1024),
            experts=(1, 8, 64),
            tokens_per_expert=(1, 16, 256),
            sequences=(1, 16, 128),
            contexts=(128, 4096),
            prompts=(128, 2048),
            skews=((4, 64),),
        )


def dtypes_of(model: ModelConfig) -> tuple[ComputeDtype, ...]:
    """FP8 needs sizes in whole blocks, and a GPU that multiplies it."""
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9):
        return ("bfloat16",)
    sizes = (model.hidden_size, model.expert_intermediate_size, model.shared_intermediate_size)
    return ("bfloat16",) if any(size % BLOCK for size in sizes) else ("bfloat16", "float8")


def grids(models: Models, sizes: OwnSizes, meter: Meter) -> list[Grid]:
    """One for each name, though two models may have it."""
    found: dict[str, Grid] = {}
    for model in models:
        experts = [n for n in sizes.experts if n <= model.num_experts]
        of_model = row_grids(model, sizes.rows, meter)
        of_model.append(decode_grid(model, sizes.sequences, sizes.contexts, meter))
        of_model.append(prefill_grid(model, sizes.prompts, meter))
        for dtype in dtypes_of(model):
            of_model += product_grids(model, sizes.rows, dtype, meter)
            of_model.append(expert_grid(model, experts, sizes.tokens_per_expert, dtype, meter))
            if model.shared_intermediate_size:
                of_model.append(shared_grid(model, sizes.rows, dtype, meter))
        for grid in of_model:
            found.setdefault(grid.name, grid)
    return list(found.values())
