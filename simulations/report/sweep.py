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
from simulations.report.sweep_grid import (
    AXES,
    METRICS,
    SweepGrid,
    axes_of,
    figure_of,
    laid_out,
    metrics_of,
)
from simulations.report.tables import SIGNIFICANT, Column, Table, Value

NUM_BEST = 8
GB = 1e9
STATUS_TONES = {"ok": "good", "does not fit": "bad", "impossible": "quiet"}
NAMES = {
    "step_ms_p99": ("step p99", "ms"),
    "imbalance_p99": ("p99", ""),
    "node_bytes_per_token": ("between nodes", "bytes/token"),
}
"""Titles and units of figures that are not drawn."""


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
    """Which points have the best first figure, at all and within the time per token asked for."""
    blocks: list[Block] = []
    if any(figures.speed_of(point) for point in result.points):
        blocks.append(
            draw(
                f"{name}-pareto",
                "Throughput against speed",
                "Every cluster of the grid. Nothing of the same policy is better in both than the "
                "points on its line.",
                "Tokens per second of each rank against tokens per second of each user, one point "
                "for each cluster, coloured by policy.",
                partial(figures.pareto, points=result.points, tpot_ms=result.tpot_ms),
                height=4.4,
            )
        )
    metrics = metrics_of(result.points)
    known = [p for p in result.points if metrics and not math.isnan(figure_of(p, metrics[0]))]
    if known:
        by = METRICS[metrics[0]][0] if metrics[0] in METRICS else metrics[0]
        blocks.append(_ranked(known, metrics[0], f"{name}-best", f"The best by {by}."))
    in_time = [point for point in known if figure_of(point, "tpot_ms") <= result.tpot_ms]
    if in_time:
        caption = f"The best by {by} within {result.tpot_ms:g} ms for each token."
        blocks.append(_ranked(in_time, metrics[0], f"{name}-best-in-time", caption))
    return Section(title="Best clusters", blocks=blocks) if blocks else None


def _ranked(points: Sequence[SweepPoint], metric: str, name: str, caption: str) -> Table:
    """The best few, best first."""
    low = metric in METRICS and METRICS[metric][2] == "low"
    ranked = sorted(points, key=lambda point: figure_of(point, metric), reverse=not low)
    return _table(ranked[:NUM_BEST], name, caption, list(METRICS))


def _pictures(result: SweepResult, name: str) -> Section | None:
    grid = laid_out(result.points)
    metrics = [
        metric
        for metric in metrics_of(result.points)
        if np.isfinite(figures.numbers_of(grid, metric)).any()
    ]
    blocks: list[Block] = [
        _picture(grid, metric, f"{name}-{slug}")
        for metric, slug in zip(metrics, slugs(metrics), strict=True)
    ]
    return Section(title="Every cluster", blocks=blocks) if blocks else None


def _picture(grid: SweepGrid, metric: str, name: str) -> Block:
    title, unit, _ = METRICS.get(metric, (metric, "", "high"))
    shown = figures.numbers_of(grid, metric).shape
    caption = "Darker is better; the best is framed. Grey: what a rank lacks in memory."
    if len(grid.points) > np.prod(shown):
        caption += " Only part of the grid has room here; the table below has all of it."
    return draw(
        name,
        f"{title} ({unit})" if unit else title,
        caption,
        f"Tables of {title} for every cluster of the grid, the best one framed.",
        partial(figures.heat_tables, grid=grid, metric=metric),
        height=0.9 + -(-shown[0] // figures.PANEL_COLUMNS) * (0.5 + 0.3 * shown[1]),
    )


def _points(result: SweepResult, name: str) -> Section:
    keys = list(dict.fromkeys(key for point in result.points for key in point.result))
    table = _table(result.points, f"{name}-points", "Every point of the grid.", keys, folded=True)
    return Section(title="As numbers", blocks=[table])


def _table(
    points: Sequence[SweepPoint],
    name: str,
    caption: str,
    keys: Sequence[str],
    *,
    folded: bool = False,
) -> Table:
    """Points by what they are and these figures, as far as any point has them."""
    axes = axes_of(points)
    keys = [key for key in keys if any(key in point.result for point in points)]
    return Table(
        name=name,
        caption=caption,
        columns=[_axis(axis, points) for axis in axes] + [_column(key, points) for key in keys],
        rows=[
            [*(_choice(axis, point) for axis in axes), *(_value(key, point) for key in keys)]
            for point in points
        ],
        folded=folded,
    )


def _axis(axis: str, points: Sequence[SweepPoint]) -> Column:
    is_text = any(isinstance(point.point.get(axis), str) for point in points)
    return Column(title=AXES.get(axis, axis), form="" if is_text else SIGNIFICANT)


def _column(key: str, points: Sequence[SweepPoint]) -> Column:
    if any(isinstance(point.result.get(key), str) for point in points):
        wide = any(len(str(point.result.get(key))) > 24 for point in points)
        return Column(title=key.replace("_", " "), tones=STATUS_TONES, wide=wide)
    if key in METRICS:
        title, unit, better = METRICS[key]
        return Column(title=title, unit=unit, form=SIGNIFICANT, best=better)
    if key.endswith("_bytes"):
        return Column(title=key.removesuffix("_bytes"), unit="GB", form=",.1f")
    title, unit = NAMES.get(key, (key.replace("_", " "), ""))
    return Column(title=title, unit=unit, form=SIGNIFICANT)


def _value(key: str, point: SweepPoint) -> Value:
    value = point.result.get(key)
    return value / GB if key.endswith("_bytes") and isinstance(value, float) else value


def _choice(axis: str, point: SweepPoint) -> Value:
    value = point.point.get(axis)
    return label_of(value) if axis == "policy" and isinstance(value, str) else value
