"""What is drawn of `simulate sweep`: tables of numbers with colours, the best one framed.

M panels, R rows, C columns.
"""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from simulations.report.style import AMOUNT_MAP, INK, RED, label_of, readable_on, short
from simulations.report.sweep_grid import AXES, METRICS, Cell, SweepGrid
from simulations.report.values import FloatArray, fact

MAX_PANELS, MAX_ROWS, MAX_COLUMNS = 12, 40, 12
PANEL_COLUMNS = 3


def numbers_of(grid: SweepGrid, metric: str) -> FloatArray:
    """[M, R, C]: the metric of each point that is drawn; NaN where there is none."""
    return np.array(
        [
            [[_number(grid, (panel, row, c), metric) for c in grid.columns[:MAX_COLUMNS]]
             for row in grid.rows[:MAX_ROWS]]
            for panel in grid.panels[:MAX_PANELS]
        ]
    )  # fmt: skip


def heat_tables(figure: Figure, grid: SweepGrid, metric: str) -> None:
    """One figure of every point, darker where it is better."""
    table_MRC = numbers_of(grid, metric)
    merit_MRC = -table_MRC if METRICS.get(metric, ("", "", "high"))[2] == "low" else table_MRC
    best = float(np.nanmax(merit_MRC))
    norm = Normalize(float(np.nanmin(merit_MRC)), best)
    num_panels = len(table_MRC)
    columns = min(PANEL_COLUMNS, num_panels)
    panels = figure.subplots(
        -(-num_panels // columns), columns, sharex=True, sharey=True, squeeze=False
    ).ravel()
    for axes in panels[num_panels:]:
        axes.remove()
    for axes, name, table_RC, merit_RC in zip(
        panels, grid.panels, table_MRC, merit_MRC, strict=False
    ):
        _table(axes, table_RC, merit_RC, norm, best)
        axes.set_title(short(label_of(fact(name))) if grid.panel_axis == "policy" else "")
    _name_axes(figure, panels[0], grid)


def _table(
    axes: Axes, table_RC: FloatArray, merit_RC: FloatArray, norm: Normalize, best: float
) -> None:
    """Cells with their numbers; the best of the whole figure in a frame with a star."""
    axes.imshow(
        np.ma.masked_invalid(merit_RC), cmap=AMOUNT_MAP, norm=norm, aspect="auto",
        interpolation="none",
    )  # fmt: skip
    for (row, column), value in np.ndenumerate(table_RC):
        known = bool(np.isfinite(value))
        is_best = known and merit_RC[row, column] == best
        colour = readable_on(AMOUNT_MAP(norm(merit_RC[row, column]))) if known else INK
        text = compact(value) + (" ★" if is_best else "")
        weight = "bold" if is_best else "normal"
        axes.text(
            column, row, text, color=colour, weight=weight, ha="center", va="center", fontsize=8.5
        )
        if is_best:
            frame = Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, ec=RED, lw=2.2)
            frame.set_clip_on(False)
            axes.add_patch(frame)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _name_axes(figure: Figure, first: Axes, grid: SweepGrid) -> None:
    columns = [short(fact(column)) for column in grid.columns[:MAX_COLUMNS]]
    first.set_xticks(range(len(columns)), labels=columns)
    rows = [short(grid.row_label(row)) for row in grid.rows[:MAX_ROWS]]
    first.set_yticks(range(len(rows)), labels=rows)
    if grid.column_axis:
        figure.supxlabel(AXES.get(grid.column_axis, short(grid.column_axis)), fontsize=10)


def _number(grid: SweepGrid, place: Cell, metric: str) -> float:
    point = grid.points.get(place)
    value = point.result.get(metric) if point else None
    return value if isinstance(value, float) else float("nan")


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
