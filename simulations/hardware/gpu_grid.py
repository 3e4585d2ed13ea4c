"""A table to be measured: what takes the time of one point, and at which points."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import numpy as np

from simulations.hardware.gpu_timing import Timing
from simulations.hardware.tables import table_json

Point = tuple[int, ...]
Part = Callable[[], tuple[dict[str, Any], dict[str, Any]]]
"""Of a measurement: its tables, and what is no table."""


def _all(*_sizes: int) -> bool:
    return True


@dataclass(frozen=True, kw_only=True)
class Grid:
    """`time` takes one size of each axis. Points that do not `fit` into memory are reckoned from their
    neighbours."""

    name: str
    axes: Mapping[str, Sequence[int]]
    time: Callable[..., Timing]
    fits: Callable[..., bool] = _all
    notes: Mapping[str, str] = field(default_factory=dict)

    def points(self) -> list[Point]:
        return [point for point in product(*self.axes.values()) if self.fits(*point)]

    def table(self) -> dict[str, Any]:
        """Measured now, as the calibration file has it."""
        times = {point: self.time(*point) for point in self.points()}
        shape = [len(points) for points in self.axes.values()]
        values = [self._value(point, times) for point in product(*self.axes.values())]
        spread = float(np.median([t.p99 / t.p50 for t in times.values()]))
        return table_json(
            self.axes,
            np.reshape(values, shape),
            p99_over_p50=round(spread, 4),
            **self.notes,
        )

    def _value(self, point: Point, times: Mapping[Point, Timing]) -> float:
        """Beyond what fits, time grows with the size of the last axis that can be smaller."""
        if point in times:
            return times[point].p50
        for i, points in reversed(list(enumerate(self.axes.values()))):
            if point[i] > points[0]:
                before = points[list(points).index(point[i]) - 1]
                smaller = (*point[:i], before, *point[i + 1 :])
                return self._value(smaller, times) * point[i] / before
        raise ValueError(f"not even the smallest point of {self.name} fits")
