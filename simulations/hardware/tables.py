"""Measured times on a grid of sizes, and what lies between the measurements.

A time grows like a power of each size over a factor of two, so tables interpolate linearly between
logarithms: exactly the measurement at a grid point, never outside the range of the neighbours
between them. Below the grid a time stays what it was at its edge (a launch costs that), above it
grows in proportion; whoever asks there should say so (`covers`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, eq=False)
class Table:
    """Seconds (`values`) at every combination of the axes' points, which ascend and are > 0."""

    axes: Mapping[str, tuple[float, ...]]
    values: Floats

    def __post_init__(self) -> None:
        shape = tuple(len(points) for points in self.axes.values())
        if not shape or self.values.shape != shape:
            raise ValueError(
                f"a table with axes {dict(zip(self.axes, shape, strict=True))} needs values of "
                f"shape {list(shape)}, got {list(self.values.shape)}"
            )
        for name, points in self.axes.items():
            if not points or points[0] <= 0 or any(np.diff(np.log(points)) <= 0):
                raise ValueError(f"axis {name!r} must ascend from above 0, got {list(points)}")
        if not np.isfinite(self.values).all() or (self.values <= 0).any():
            raise ValueError("the values of a table must be finite and > 0")

    @cached_property
    def _log_values(self) -> Floats:
        return np.log(self.values)

    @cached_property
    def _log_axes(self) -> tuple[Floats, ...]:
        return tuple(np.log(points) for points in self.axes.values())

    @classmethod
    def from_json(cls, table: Mapping[str, Any]) -> Table:
        """Of {"axes": {name: [...]}, "values": nested list, ...}. Raises ValueError."""
        axes = {name: tuple(map(float, points)) for name, points in table["axes"].items()}
        return cls(axes=axes, values=np.asarray(table["values"], dtype=np.float64))

    def at(self, **sizes: ArrayLike) -> Floats:
        """Seconds at these sizes, one argument an axis, broadcast against each other."""
        if set(sizes) != set(self.axes):
            raise ValueError(f"the table has the axes {list(self.axes)}, not {sorted(sizes)}")
        if len(self.axes) == 1:
            return self._along(np.asarray(next(iter(sizes.values())), np.float64))
        wanted = np.broadcast_arrays(*(np.asarray(sizes[name], np.float64) for name in self.axes))
        shape = wanted[0].shape
        values, beyond = self._log_values, np.zeros(shape)
        corners = [(np.ones(shape), np.zeros(shape, np.intp))]  # weight, index into flat values
        for points, logs, x in zip(self.axes.values(), self._log_axes, wanted, strict=True):
            log_x = np.log(np.maximum(x, points[0]))
            beyond += np.maximum(log_x - logs[-1], 0)
            left = np.clip(np.searchsorted(logs, log_x, side="right") - 1, 0, max(0, len(logs) - 2))
            right = np.minimum(left + 1, len(logs) - 1)
            width = np.where(right > left, logs[right] - logs[left], 1.0)
            share = np.clip((log_x - logs[left]) / width, 0, 1)
            corners = [
                (weight * part, index * len(logs) + column)
                for weight, index in corners
                for part, column in ((1 - share, left), (share, right))
            ]
        flat = values.ravel()
        return np.exp(beyond + sum(weight * flat[index] for weight, index in corners))

    def _along(self, x: Floats) -> Floats:
        """What `at` computes, where there is one axis: in a fifth of the time."""
        (logs,) = self._log_axes
        log_x = np.maximum(np.log(np.maximum(x, 1e-300)), logs[0])
        within = np.interp(log_x, logs, self._log_values)
        return np.asarray(np.exp(within + np.maximum(log_x - logs[-1], 0)))

    def covers(self, **sizes: ArrayLike) -> bool:
        """Whether all these sizes lie inside the grid."""
        return all(
            self.axes[name][0] <= np.min(x) and np.max(x) <= self.axes[name][-1]
            for name, x in sizes.items()
        )

    def without(self, name: str, indices: Sequence[int]) -> Table:
        """Less some points of one axis: what a prediction of those points may know."""
        axis = list(self.axes).index(name)
        points = tuple(x for i, x in enumerate(self.axes[name]) if i not in indices)
        values = np.delete(self.values, list(indices), axis=axis)
        return Table(axes={**self.axes, name: points}, values=values)


def table_json(axes: Mapping[str, Sequence[float]], values: Any, **notes: Any) -> dict[str, Any]:
    """A table as the calibration file has it; times are kept to four digits."""
    rounded = np.vectorize(lambda x: float(f"{x:.4g}"))(np.asarray(values, dtype=np.float64))
    return {
        **notes,
        "axes": {name: list(points) for name, points in axes.items()},
        "unit": "s",
        "values": rounded.tolist(),
    }
