"""What happened, step by step and request by request."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

MAX_POINTS = 400
STEPS_PER_POINT = 4
"""In the mean, at least: fewer would show steps, not rates."""
FloatArray = NDArray[np.float64]


class Event(NamedTuple):
    time_s: float
    kind: str
    """failure, recovery or rebalance."""
    what: str


class Sample(NamedTuple):
    """The state after one step, or (no input tokens) while all wait for lost ranks.

    `kv_usage`: share of blocks, mean over the replicas that live.
    """

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
    num_steps: int = 0
    _samples: array[float] = field(default_factory=lambda: array("d"))

    def count(self, now_s: float, num_requests: int) -> None:
        """So many requests were in the system since the last call."""
        self.request_seconds += num_requests * (now_s - self.counted_until_s)
        self.counted_until_s = now_s

    def add(self, sample: Sample) -> None:
        self._samples.extend(sample)
        self.num_steps += sample.input_tokens > 0

    def samples(self) -> dict[str, FloatArray]:
        """[samples] of each field of Sample."""
        table = np.array(self._samples).reshape(-1, len(Sample._fields))
        return {name: table[:, column] for column, name in enumerate(Sample._fields)}

    def series(self) -> dict[str, list[float]]:
        """At most MAX_POINTS equal intervals of time: rates, and means over the samples there.

        Where there is none (an idle cluster) the state is that of the last before, and before the first
        that of the first.
        """
        samples = self.samples()
        end_s = samples["end_s"]
        if not len(end_s):
            return {name: [] for name in ("time_s", "output_tokens_per_s", *_MEANS)}
        num = min(MAX_POINTS, max(1, len(end_s) // STEPS_PER_POINT))
        edges = np.linspace(0.0, end_s[-1], num + 1)
        bin_of = np.clip(np.searchsorted(edges, end_s, side="left") - 1, 0, num - 1)
        samples_in = np.bincount(bin_of, minlength=num)
        tokens = np.bincount(bin_of, weights=samples["output_tokens"], minlength=num)
        series = {
            "time_s": edges[1:].tolist(),
            "output_tokens_per_s": (tokens / np.diff(edges)).tolist(),
        }
        last = np.maximum.accumulate(
            np.where(samples_in > 0, np.arange(num), np.flatnonzero(samples_in)[0])
        )
        for name in _MEANS:
            sums = np.bincount(bin_of, weights=samples[name], minlength=num)
            series[name] = (sums / np.maximum(samples_in, 1))[last].tolist()
        return series


_MEANS = ("running", "waiting", "kv_usage", "balancedness")
