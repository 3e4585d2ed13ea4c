"""Have our kernels compiled in several processes, each with a share of the calls: one alone would take minutes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from random import Random
from typing import TypeVar

import torch

from simulations.hardware.gpu_meter import Meter, OnceMeter
from simulations.hardware.gpu_step_check import SEQUENCES, one_step
from simulations.hardware.gpu_timing import Call
from simulations.hardware.own_grids import Models, OwnSizes, dtypes_of, grids

T = TypeVar("T")

MOST_PROCESSES = 15
PROCESS_BYTES = 5 << 30  # of the device's memory, that a compiling process may take


def compile_kernels(models: Models, sizes: OwnSizes) -> None:
    """Fill Triton's cache by making every call once, in as many processes as there are cores."""
    memory = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    cores = (os.cpu_count() or 2) - 1
    processes = max(1, min(MOST_PROCESSES, cores, memory // PROCESS_BYTES))
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        shares = [(models, sizes, share, processes) for share in range(processes)]
        list(pool.map(_compile, *zip(*shares, strict=True)))


def _compile(models: Models, sizes: OwnSizes, share: int, shares: int) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    with torch.inference_mode():
        for call in shared(every_call(models, sizes, OnceMeter(device=device)), share, shares):
            call()
            torch.cuda.empty_cache()  # the processes share one device
    torch.cuda.synchronize()


def every_call(models: Models, sizes: OwnSizes, meter: Meter) -> list[Call]:
    """What measuring will do: all points, and steps of layers."""
    points = [
        partial(grid.time, *point)
        for grid in grids(models, sizes, meter)
        for point in grid.points()
    ]
    model = models[-1]
    steps = [
        partial(one_step, model, dtype, number)
        for dtype in dtypes_of(model)
        for number in SEQUENCES
    ]
    return [*points, *steps]


def shared(calls: Sequence[T], share: int, shares: int) -> list[T]:
    """Every `shares`-th call in an order that is alike everywhere, and random: neighbours run the same
    kernels, which processes in step with each other would all compile at once."""
    shuffled = list(calls)
    Random(0).shuffle(shuffled)
    return shuffled[share::shares]
