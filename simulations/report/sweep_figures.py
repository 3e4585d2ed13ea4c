"""What is drawn of `simulate sweep`: tables of numbers with colours, the best one framed.

M panels, R rows, C columns.
"""

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from simulations.report.fronts import front_of
from simulations.report.other_results import SweepPoint
from simulations.report.style import (
    AMOUNT_MAP,
    INK,
    RED,
    Colour,
    colour_of,
    dashes_of,
    label_of,
    readable_on,
    short,
)
from simulations.report.sweep_grid import AXES, METRICS, Cell, SweepGrid, figure_of
from simulations.report.values import FloatArray, fact

MAX_PANELS, MAX_ROWS, MAX_COLUMNS = 12, 40, 12
PANEL_COLUMNS = 3
GB = 1e9


def numbers_of(grid: SweepGrid, metric: str) -> FloatArray:
    """[M, R, C]: the metric of each point that is drawn; NaN where there is none."""
    return np.array(
        [
            [[_in_cell(grid, (panel, row, c), metric) for c in grid.columns[:MAX_COLUMNS]]
             for row in grid.rows[:MAX_ROWS]]
            for panel in grid.panels[:MAX_PANELS]
        ]
    )  # fmt: skip


def heat_tables(figure: Figure, grid: SweepGrid, metric: str) -> None:
    """One figure of every point, darker where it is better."""
    table_MRC, missing_MRC = numbers_of(grid, metric), numbers_of(grid, "missing_bytes")
    merit_MRC = -table_MRC if METRICS.get(metric, ("", "", "high"))[2] == "low" else table_MRC
    best = float(np.nanmax(merit_MRC))
    norm = Normalize(float(np.nanmin(merit_MRC)), best)
    columns = min(PANEL_COLUMNS, len(table_MRC))
    rows = -(-len(table_MRC) // columns)
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    for axes in panels[len(table_MRC) :]:
        axes.remove()
    for m, axes in enumerate(panels[: len(table_MRC)]):
        axes.imshow(
            np.ma.masked_invalid(merit_MRC[m]), cmap=AMOUNT_MAP, norm=norm, aspect="auto",
            interpolation="none",
        )  # fmt: skip
        for place, value in np.ndenumerate(table_MRC[m]):
            if np.isfinite(value):
                merit = merit_MRC[m][place]
                _write(axes, place, value, AMOUNT_MAP(norm(merit)), is_best=merit == best)
            elif np.isfinite(missing_MRC[m][place]):
                text = f"−{compact(missing_MRC[m][place] / GB)} GB"
                axes.text(*place[::-1], text, ha="center", va="center", fontsize=7.5)
        axes.set_title(_panel_name(grid, m))
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    _name_axes(figure, panels[0], grid)


def _write(axes: Axes, place: tuple[int, ...], value: float, on: Colour, *, is_best: bool) -> None:
    """A cell's number; the best of the whole figure in a frame, with a star."""
    row, column = place
    text = compact(value) + (" ★" if is_best else "")
    weight = "bold" if is_best else "normal"
    axes.text(
        column, row, text, color=readable_on(on), weight=weight, ha="center", va="center",
        fontsize=8.5,
    )  # fmt: skip
    if is_best:
        frame = Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, ec=RED, lw=2.2)
        frame.set_clip_on(False)
        axes.add_patch(frame)


def _panel_name(grid: SweepGrid, panel: int) -> str:
    return short(label_of(fact(grid.panels[panel]))) if grid.panel_axis else ""


def _name_axes(figure: Figure, first: Axes, grid: SweepGrid) -> None:
    columns = [short(fact(column)) for column in grid.columns[:MAX_COLUMNS]]
    first.set_xticks(range(len(columns)), labels=columns)
    rows = [short(grid.row_label(row)) for row in grid.rows[:MAX_ROWS]]
    first.set_yticks(range(len(rows)), labels=rows)
    if grid.column_axis:
        figure.supxlabel(AXES.get(grid.column_axis, short(grid.column_axis)), fontsize=10)


def _in_cell(grid: SweepGrid, place: Cell, metric: str) -> float:
    point = grid.points.get(place)
    return figure_of(point, metric) if point else math.nan


def speed_of(point: SweepPoint) -> tuple[float, float] | None:
    """Tokens per second of each user and of each rank, if the point has both."""
    tpot_ms, of_rank = figure_of(point, "tpot_ms"), figure_of(point, "tokens_per_s_per_rank")
    return (1000 / tpot_ms, of_rank) if tpot_ms > 0 and np.isfinite(of_rank) else None


def pareto(figure: Figure, points: Sequence[SweepPoint], tpot_ms: float) -> None:
    """Every point by what its users and its ranks get, and the best of each policy joined."""
    axes = figure.subplots()
    policies = list(dict.fromkeys(fact(point.point.get("policy", "")) for point in points))
    for policy in policies:
        mine = [point for point in points if fact(point.point.get("policy", "")) == policy]
        pairs = sorted({pair for pair in map(speed_of, mine) if pair})
        if not pairs:
            continue
        colour = colour_of(policy, policies)
        x, y = zip(*pairs, strict=True)
        axes.scatter(x, y, color=colour, s=26, zorder=3)
        axes.plot(
            *zip(*front_of(pairs), strict=True),
            color=colour,
            linestyle=dashes_of(policy, policies),
            marker="o",
            markersize=5,
            label=short(label_of(policy)) or "all",
        )
    if tpot_ms > 0:
        label = f"{tpot_ms:g} ms for each token"
        axes.axvline(1000 / tpot_ms, color=INK, linestyle=":", linewidth=1.2, label=label)
    axes.set(xlabel="tokens/s of each user", ylabel="tokens/s of each rank", ylim=(0, None))
    axes.yaxis.set_major_formatter("{x:,g}")
    axes.grid(visible=True)
    figure.legend(loc="outside upper left", ncols=5)


def compact(value: float) -> str:
    """A number in at most six characters: 1.23, 45.6, 789, 12.3k, 4.56M; "–" for NaN."""
    if not np.isfinite(value):
        return "–"
    for suffix, unit in (("", 1.0), ("k", 1e3), ("M", 1e6), ("G", 1e9), ("T", 1e12)):
        scaled = value / unit
        if abs(scaled) < 999.5:
            digits = 0 if abs(scaled) >= 99.95 else 1 if abs(scaled) >= 9.995 else 2
            return f"{scaled:.{digits}f}{suffix}".replace("-", "−")
    return f"{value:.1e}"
