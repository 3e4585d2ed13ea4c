"""Seconds of GPU work: captured in a graph, replayed many times, timed by the GPU's own clock.

Calls of one graph take turns over copies of their operands that together exceed the L2 cache, as the
layers of a model do; otherwise a second run of the same product would read its weights from there.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from time import perf_counter
from types import TracebackType

import numpy as np
import torch

Call = Callable[[], object]

GRAPH_S = 2e-3  # of one replay: the gap before its first kernel is then well below a percent
MOST_CALLS = 512
WARM_UP_S = 0.03  # before the replays that count: clocks follow the load
REPLAYS = 40
BUDGET_S = 0.4  # of one measurement


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds of one call: median and 99th percentile over the replays."""

    p50: float
    p99: float


def seconds_of(calls: Sequence[Call]) -> Timing:
    """Of one of `calls`, which do the same work on different memory."""
    graph = captured(calls, len(calls))
    once_s = max(replay_seconds(graph, 3)) / len(calls)
    number = len(calls)
    if once_s * number < GRAPH_S:
        number = min(MOST_CALLS, max(number, round(GRAPH_S / once_s)))
        graph = captured(calls, number)
    for _ in range(int(np.clip(WARM_UP_S / (once_s * number), 1, REPLAYS))):
        graph.replay()
    replays = int(np.clip(BUDGET_S / (once_s * number), 9, REPLAYS))
    times = np.array(replay_seconds(graph, replays)) / number
    return Timing(p50=float(np.median(times)), p99=float(np.quantile(times, 0.99)))


def warm_up(seconds: float = 1.0) -> None:
    """Work until the GPU has left its idle clocks."""
    x = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    end = perf_counter() + seconds
    while perf_counter() < end:
        for _ in range(20):
            x @ x
        torch.cuda.synchronize()


def copies_of(make: Callable[[], torch.Tensor], num_bytes: float) -> list[torch.Tensor]:
    """As many operands of that size as do not fit the L2 cache together, at most 64."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return [make() for _ in range(int(np.clip(np.ceil(2.5 * cache / num_bytes), 1, 64)))]


def captured(calls: Sequence[Call], number: int) -> torch.cuda.CUDAGraph:
    """A graph of so many calls, in turns."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # libraries set themselves up and kernels compile before
        for call in calls:
            call()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(number):
            calls[i % len(calls)]()
    return graph


def replay_seconds(graph: torch.cuda.CUDAGraph, times: int) -> list[float]:
    """Seconds of each replay, after one that does not count."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(times + 1)]
    graph.replay()
    for event in events[:-1]:
        event.record()
        graph.replay()
    events[-1].record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) / 1000 for a, b in pairwise(events)]


@dataclass
class ClockLog:
    """SM clock (MHz) and power (W) while measuring, sampled by a thread; empty where not readable."""

    interval_s: float = 0.2
    samples: list[tuple[float, float]] = field(default_factory=list)

    def __enter__(self) -> ClockLog:
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._stop.wait(self.interval_s):
            try:
                self.samples.append((torch.cuda.clock_rate(), torch.cuda.power_draw() / 1000))
            except (RuntimeError, ImportError):  # needs NVML and its Python package
                return

    def summary(self) -> dict[str, float]:
        if not self.samples:
            return {}
        clock, power = np.array(self.samples, dtype=np.float64).T
        low, middle, high = np.quantile(clock, [0.05, 0.5, 0.95])
        return {
            "sm_clock_mhz_p5": float(low),
            "sm_clock_mhz_p50": float(middle),
            "sm_clock_mhz_p95": float(high),
            "power_w_p50": float(np.median(power)),
            "power_w_max": float(power.max()),
        }
