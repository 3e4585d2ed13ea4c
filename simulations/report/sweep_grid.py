"""The points of a sweep laid out as tables: which axes become columns, rows and panels."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from simulations.report.other_results import SweepPoint
from simulations.report.values import fact

AXES = {
    "num_nodes": "nodes",
    "ranks_per_node": "ranks/node",
    "num_redundant_experts": "redundant",
    "tokens_per_rank": "tokens per rank",
    "context": "context",
    "overlap": "overlap",
    "policy": "policy",
}
METRICS: dict[str, tuple[str, str, Literal["low", "high"]]] = {
    "throughput": ("throughput", "tokens/s", "high"),
    "tokens_per_s_per_rank": ("throughput of a rank", "tokens/s", "high"),
    "step_ms_mean": ("step", "ms", "low"),
    "tpot_ms": ("time per token", "ms", "low"),
    "imbalance_mean": ("mean imbalance", "", "low"),
}
"""Figures of a point that are drawn: title, unit, and which end of the scale is better."""
Axis = Sequence[float | str]
Place = tuple[float | str, ...]
Cell = tuple[float | str, Place, float | str]


@dataclass(frozen=True, kw_only=True)
class SweepGrid:
    """Every point by (panel, row, column). An axis with one value only is part of none of them."""

    panel_axis: str
    row_axes: Sequence[str]
    column_axis: str
    panels: Axis
    rows: Sequence[Place]
    columns: Axis
    points: dict[Cell, SweepPoint]

    def row_label(self, row: Place) -> str:
        named = zip(self.row_axes, row, strict=True)
        return ", ".join(f"{AXES.get(axis, axis)} {fact(value)}" for axis, value in named)


def laid_out(points: Sequence[SweepPoint]) -> SweepGrid:
    """Policies as panels, tokens per rank (or the axis with most values) as columns."""
    values = {axis: _values(points, axis) for axis in axes_of(points)}
    varying = [axis for axis, found in values.items() if len(found) > 1]
    panel = "policy" if "policy" in varying and len(varying) > 1 else ""
    rest = [axis for axis in varying if axis != panel]
    column = "tokens_per_rank" if "tokens_per_rank" in rest else ""
    if not column and rest:
        column = max(rest, key=lambda axis: len(values[axis]))
    row_axes = [axis for axis in rest if axis != column]
    places = {
        (
            point.point.get(panel, ""),
            tuple(point.point.get(axis, "–") for axis in row_axes),
            point.point.get(column, ""),
        ): point
        for point in points
    }
    return SweepGrid(
        panel_axis=panel,
        row_axes=row_axes,
        column_axis=column,
        panels=list(dict.fromkeys(place[0] for place in places)),
        rows=list(dict.fromkeys(place[1] for place in places)),
        columns=_sorted(dict.fromkeys(place[2] for place in places)),
        points=places,
    )


def axes_of(points: Sequence[SweepPoint]) -> list[str]:
    """Every axis of any point, in the order of first mention."""
    return list(dict.fromkeys(axis for point in points for axis in point.point))


def metrics_of(points: Sequence[SweepPoint]) -> list[str]:
    """The figures to draw: those we know, else the first number that any point has."""
    found = [
        key for point in points for key, value in point.result.items() if isinstance(value, float)
    ]
    known = [metric for metric in METRICS if metric in found]
    return known or found[:1]


def figure_of(point: SweepPoint, key: str) -> float:
    """One of the point's figures; NaN where it has none of that name."""
    value = point.result.get(key)
    return value if isinstance(value, float) else math.nan


def _values(points: Sequence[SweepPoint], axis: str) -> list[float | str]:
    return list(dict.fromkeys(point.point.get(axis, "–") for point in points))


def _sorted(values: dict[float | str, None]) -> list[float | str]:
    """Numbers by size; if any is text, in the order they came in."""
    numbers = [value for value in values if isinstance(value, float)]
    return [*sorted(numbers)] if len(numbers) == len(values) else list(values)
