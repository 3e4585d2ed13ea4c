"""Microseconds of every way between GPUs, beside those of its floor.

Every figure is of one call among many in a CUDA graph, so of one that follows another without the host
between them; inputs take turns over more memory than the L2 cache holds.

Legend: T tokens of a rank, H hidden, K top-k, R received rows, P pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from comms.group import Group
from comms.symmetric_layout import SymmetricLayout
from simulations.bench.exchange_ways import Dispatcher, Ways
from simulations.bench.exchange_workload import RankTensors
from simulations.hardware.gpu_timing import replay_seconds

LINK_BYTES_PER_S = 450e9
Call = Callable[[], object]
Figures = dict[str, float]


def figures(tensors: RankTensors, world: Group, ways: Ways, tokens: int) -> dict[str, Figures]:
    """Of each way: microseconds, those of its floor, bytes that leave this rank. Collective."""
    workload, hidden = tensors.workload, tensors.workload.hidden
    found: dict[str, Figures] = {}
    for dispatcher in ways.all:
        dispatcher.expect(tokens)
    inputs = tensors.copies(tokens)
    sent = workload.rows_to_peers(tensors.rank, inputs[0].slots_TK)
    for dispatcher in (ways.float8, ways.bfloat16):
        layout = dispatcher.layout
        calls: list[Call] = [
            partial(dispatcher.dispatch, *tensors.arguments(x, "node")) for x in inputs
        ]
        found[f"dispatch_{layout.dispatch_dtype}"] = timed(world, calls, sent * _bytes_of(layout))
    for name, dispatcher in (
        ("combine_sums", ways.bfloat16),
        ("combine_pairs", ways.bfloat16),
        ("combine_fixed", ways.fixed),
    ):
        calls = []
        for x in inputs[:2]:
            arguments = tensors.arguments(x, dispatcher.layout.combine)
            received, handle = dispatcher.dispatch(*arguments)
            places, y_PH = tensors.outputs(received.local_slots_RK, tensors.rank)
            if name == "combine_sums":
                shape = (workload.ranks * tokens, hidden)
                sums_RH = torch.randn(shape, device=tensors.device).bfloat16()
                calls.append(partial(dispatcher.combine, sums_RH, None, handle))
            else:
                calls.append(partial(dispatcher.combine, y_PH, places, handle))
        found[name] = timed(world, calls, sent * 2 * hidden)
    calls = [
        partial(_round_trip, ways.float8, tensors.arguments(x, "node"), y_PH, places)
        for x in inputs
    ]
    found["round_trip"] = timed(world, calls, sent * (_bytes_of(ways.float8.layout) + 2 * hidden))
    for dispatcher in ways.all:
        dispatcher.check()
    return {ways.prefix + name: row for name, row in found.items()}


def _bytes_of(layout: SymmetricLayout) -> int:
    """Of a row on its way, with its slots."""
    return layout.row_bytes + 4 * layout.num_topk


def _round_trip(
    dispatcher: Dispatcher, arguments: Sequence[Tensor], y_PH: Tensor, places_RK: Tensor
) -> None:
    _, handle = dispatcher.dispatch(*arguments)
    dispatcher.combine(y_PH, places_RK, handle)


def timed(world: Group, calls: Sequence[Call], num_bytes: float) -> Figures:
    """Median over replays of a graph of an even number of calls, all ranks at once."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    world.barrier()
    number = max(len(calls) + len(calls) % 2, 8 if num_bytes > 1e7 else 32)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for i in range(number):
            calls[i % len(calls)]()
    times = []
    for _ in range(3):
        world.barrier()
        times += [1e6 * seconds / number for seconds in replay_seconds(graph, 7)]
    return {
        "us": float(np.median(times)),
        "us_p90": float(np.quantile(times, 0.9)),
        "floor_us": 1e6 * num_bytes / LINK_BYTES_PER_S,
        "bytes": float(num_bytes),
    }
