"""Whoever takes the time of calls on a GPU: by graph replays, or, to have kernels compiled, not at all.

What is measured is written once, as a function of a meter; so the processes that compile kernels
beforehand make the very calls that are timed afterwards, and a test makes them without a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
import torch

from simulations.hardware.gpu_timing import Call, Timing, replay_seconds

T = TypeVar("T")

MOST_COPIES = 64
CACHES = 2.5  # as large as that many L2 caches are operands together, so that none is found there
SHORT_S = 1e-4  # of a call up to which the host's own time cannot be told from it
SHORT_CALLS = 96  # of a graph of such calls: the gap between two replays is below a percent
GRAPH_S = 2e-3
MOST_REPLAYS, BUDGET_S = 12, 0.04


class Meter(Protocol):
    @property
    def device(self) -> torch.device: ...
    @property
    def times(self) -> bool:
        """Whether seconds are real."""

    def copies(self, make: Callable[[], T], num_bytes: float) -> list[T]:
        """As many operands of that size as do not fit the L2 cache together."""

    def seconds(self, calls: Sequence[Call]) -> Timing:
        """Of one of `calls`, which do the same work on different memory."""


@dataclass(frozen=True, kw_only=True)
class GraphMeter:
    """Median over replays of a captured graph in which the calls take turns."""

    device: torch.device
    times: bool = True

    def copies(self, make: Callable[[], T], num_bytes: float) -> list[T]:
        cache = torch.cuda.get_device_properties(self.device).L2_cache_size
        number = np.clip(np.ceil(CACHES * cache / num_bytes), 1, MOST_COPIES)
        return [make() for _ in range(int(number))]

    def seconds(self, calls: Sequence[Call]) -> Timing:
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.stream(stream):
            calls[0]()  # compiles
            start.record()
            for call in calls:
                call()
            end.record()
        stream.synchronize()
        once_s = start.elapsed_time(end) / 1000 / len(calls)
        number = SHORT_CALLS if once_s < SHORT_S else round(GRAPH_S / once_s)
        number = max(number, len(calls) if once_s < SHORT_S else 1)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for i in range(number):
                calls[i % len(calls)]()
        graph_s = max(replay_seconds(graph, 2)) or GRAPH_S
        replays = int(np.clip(BUDGET_S / graph_s, 3, MOST_REPLAYS))
        times = np.array(replay_seconds(graph, replays)) / number
        return Timing(p50=float(np.median(times)), p99=float(np.quantile(times, 0.99)))


@dataclass(frozen=True, kw_only=True)
class OnceMeter:
    """Makes each call once: its kernels are compiled then, or checked in Triton's interpreter."""

    device: torch.device
    times: bool = False

    def copies(self, make: Callable[[], T], num_bytes: float) -> list[T]:
        return [make()]

    def seconds(self, calls: Sequence[Call]) -> Timing:
        for call in calls:
            call()
        return Timing(p50=1e-6, p99=1e-6)
