"""What happened, step by step and request by request."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

MAX_POINTS = 400
FloatArray = NDArray[np.float64]


class Event(NamedTuple):
    time_s: float
    kind: str
    """failure, recovery or rebalance."""
    what: str


class StepRecord(NamedTuple):
    """The state after one step. `kv_usage`: share of blocks, mean over the replicas that live."""

    start_s: float
    end_s: float
    output_tokens: int
    input_tokens: int
    running: int
    waiting: int
    kv_usage: float
    balancedness: float


@dataclass
class Record:
    """`request_seconds` is the integral over time of the number of requests in the system."""

    events: list[Event] = field(default_factory=list)
    request_seconds: float = 0.0
    counted_until_s: float = 0.0
    _steps: array[float] = field(default_factory=lambda: array("d"))

    def count(self, now_s: float, num_requests: int) -> None:
        """So many requests were in the system since the last call."""
        self.request_seconds += num_requests * (now_s - self.counted_until_s)
        self.counted_until_s = now_s

    def add(self, step: StepRecord) -> None:
        self._steps.extend(step)

    @property
    def num_steps(self) -> int:
        return len(self._steps) // len(StepRecord._fields)

    def steps(self) -> dict[str, FloatArray]:
        """[steps] of each field of StepRecord."""
        table = np.array(self._steps).reshape(-1, len(StepRecord._fields))
        return {name: table[:, column] for column, name in enumerate(StepRecord._fields)}

    def series(self) -> dict[str, list[float]]:
        """At most MAX_POINTS equal intervals of time: rates, and means over the steps that end there.

        Where no step ends (an idle or paused cluster) the state is that of the step before, and before
        the first that of the first.
        """
        steps = self.steps()
        end_s = steps["end_s"]
        if not len(end_s):
            return {name: [] for name in ("time_s", "output_tokens_per_s", *_MEANS)}
        num = min(MAX_POINTS, len(end_s))
        edges = np.linspace(0.0, end_s[-1], num + 1)
        bin_of = np.clip(np.searchsorted(edges, end_s, side="left") - 1, 0, num - 1)
        steps_in = np.bincount(bin_of, minlength=num)
        tokens = np.bincount(bin_of, weights=steps["output_tokens"], minlength=num)
        series = {
            "time_s": edges[1:].tolist(),
            "output_tokens_per_s": (tokens / np.diff(edges)).tolist(),
        }
        last = np.maximum.accumulate(np.where(steps_in > 0, np.arange(num), steps_in.argmax()))
        for name in _MEANS:
            sums = np.bincount(bin_of, weights=steps[name], minlength=num)
            series[name] = (sums / np.maximum(steps_in, 1))[last].tolist()
        return series


_MEANS = ("running", "waiting", "kv_usage", "balancedness")
