"""The chapter of `simulate sweep`: which cluster of a grid is the best one."""

import math
from collections.abc import Sequence
from functools import partial

import numpy as np

from simulations.report import sweep_figures as figures
from simulations.report.chapter import Block, Chapter, Section, facts_of, slugs, title_of
from simulations.report.other_results import SweepPoint, SweepResult
from simulations.report.picture import draw
from simulations.report.style import label_of
from simulations.report.sweep_grid import AXES, METRICS, SweepGrid, axes_of, laid_out, metrics_of
from simulations.report.tables import SIGNIFICANT, Column, Table, Value

NUM_BEST = 8
STATUS_TONES = {"ok": "good", "does not fit": "bad", "impossible": "quiet"}


def sweep_chapter(result: SweepResult, name: str) -> Chapter:
    sections = []
    if result.points:
        sections = [_best(result, name), _pictures(result, name), _points(result, name)]
    return Chapter(
        name=name,
        title=title_of(result, "Sweep of clusters"),
        result=result,
        facts=facts_of(result),
        sections=[section for section in sections if section is not None],
    )


def _best(result: SweepResult, name: str) -> Section | None:
    """The points that are best by the first figure, best first."""
    metrics = metrics_of(result.points)
    if not metrics:
        return None
    title, _, better = METRICS.get(metrics[0], (metrics[0], "", "high"))
    sign = 1 if better == "low" else -1
    ranked = sorted(
        (point for point in result.points if not math.isnan(_merit(point, metrics[0]))),
        key=lambda point: sign * _merit(point, metrics[0]),
    )
    table = _table(
        ranked[:NUM_BEST], f"{name}-best", f"The best {NUM_BEST} by {title}, best first."
    )
    return Section(title="Best clusters", blocks=[table]) if ranked else None


def _merit(point: SweepPoint, metric: str) -> float:
    value = point.result.get(metric)
    return value if isinstance(value, float) else math.nan


def _pictures(result: SweepResult, name: str) -> Section | None:
    grid = laid_out(result.points)
    metrics = [
        m for m in metrics_of(result.points) if np.isfinite(figures.numbers_of(grid, m)).any()
    ]
    blocks: list[Block] = [
        _picture(grid, metric, f"{name}-{slug}")
        for metric, slug in zip(metrics, slugs(metrics), strict=True)
    ]
    return Section(title="Every cluster", blocks=blocks) if blocks else None


def _picture(grid: SweepGrid, metric: str, name: str) -> Block:
    title, unit, _ = METRICS.get(metric, (metric, "", "high"))
    shown = figures.numbers_of(grid, metric).shape
    num_panels, num_rows = shown[0], shown[1]
    left_out = len(grid.points) - int(np.prod(shown))
    caption = "Darker is better; the best is framed. “–”: it does not fit, or was not tried."
    if left_out > 0:
        caption += " Only part of the grid has room here; the table below has all of it."
    return draw(
        name,
        f"{title} ({unit})" if unit else title,
        caption,
        f"Tables of {title} for every cluster of the grid, the best one framed.",
        partial(figures.heat_tables, grid=grid, metric=metric),
        height=0.9 + -(-num_panels // figures.PANEL_COLUMNS) * (0.5 + 0.3 * num_rows),
    )


def _points(result: SweepResult, name: str) -> Section:
    table = _table(result.points, f"{name}-points", "Every point of the grid.", folded=True)
    return Section(title="As numbers", blocks=[table])


def _table(points: Sequence[SweepPoint], name: str, caption: str, *, folded: bool = False) -> Table:
    axes = axes_of(points)
    keys = list(dict.fromkeys(key for point in points for key in point.result))
    return Table(
        name=name,
        caption=caption,
        columns=[Column(title=AXES.get(axis, axis), form=SIGNIFICANT) for axis in axes]
        + [_column(key) for key in keys],
        rows=[
            [*(_choice(axis, p) for axis in axes), *(p.result.get(key) for key in keys)]
            for p in points
        ],
        folded=folded,
    )


def _column(key: str) -> Column:
    if key not in METRICS:
        return Column(title=key.replace("_", " "), form=SIGNIFICANT, tones=STATUS_TONES)
    title, unit, better = METRICS[key]
    return Column(title=title, unit=unit, form=SIGNIFICANT, best=better)


def _choice(axis: str, point: SweepPoint) -> Value:
    value = point.point.get(axis)
    return label_of(value) if axis == "policy" and isinstance(value, str) else value
