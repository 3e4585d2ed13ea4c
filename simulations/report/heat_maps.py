"""Heat maps: loads against their mean, and amounts between pairs.

A map with more rows or columns than a picture has room for shows several in one cell: the largest,
since a layer ends when its busiest rank does.

R rows, C columns, of any map.
"""

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, Normalize
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from simulations.report.style import AMOUNT_MAP, FAINT, INK, LOAD_MAP, readable_on
from simulations.report.values import FloatArray

MAX_ROWS, MAX_COLUMNS = 320, 580
FEW = 8  # cells of a row that have room for their numbers
RANK_TICKS = {0.5: "≤ ½", 0.71: "0.71", 1.0: "1", 1.41: "1.41", 2.0: "≥ 2"}
EXPERT_TICKS = {1 / 8: "≤ ⅛", 1 / 4: "¼", 1 / 2: "½", 1: "1", 2: "2", 4: "4", 8: "≥ 8"}
"""Scales of loads over their mean: the last tick is where the strongest colour is reached."""


def coarse(map_RC: FloatArray, max_rows: int, max_columns: int) -> tuple[FloatArray, int, int]:
    """The map with at most so many rows and columns, and how many are in one row and column.

    A cell is the largest of those it stands for, or NaN if none of them is known.
    """
    rows, columns = map_RC.shape
    tall, broad = -(-rows // max_rows), -(-columns // max_columns)
    if tall == broad == 1:
        return map_RC, 1, 1
    padded = np.pad(map_RC, ((0, -rows % tall), (0, -columns % broad)), constant_values=np.nan)
    blocks = padded.reshape(padded.shape[0] // tall, tall, padded.shape[1] // broad, broad)
    return np.fmax.reduce(np.fmax.reduce(blocks, axis=3), axis=1), tall, broad


def load_map(
    axes: Axes, map_RC: FloatArray, ticks: Mapping[float, str], *, rows: str, columns: str
) -> None:
    """Loads over their mean, [rows, columns], on a logarithmic scale between the outer ticks."""
    shown, tall, broad = coarse(map_RC, MAX_ROWS, MAX_COLUMNS)
    with np.errstate(divide="ignore"):
        factors = np.log2(np.maximum(shown, 0))
    reach = float(np.log2(max(ticks)))
    norm = Normalize(-reach, reach)
    _cells(axes, np.clip(factors, -reach, reach), map_RC.shape, LOAD_MAP, norm)
    axes.set(xlabel=_several(columns, broad), ylabel=_several(rows, tall))


def load_scale(figure: Figure, axes: list[Axes], ticks: Mapping[float, str]) -> None:
    """The legend of load maps, beside `axes`."""
    reach = float(np.log2(max(ticks)))
    colours = ScalarMappable(Normalize(-reach, reach), LOAD_MAP)
    bar = figure.colorbar(colours, ax=axes, aspect=24, pad=0.015, fraction=0.03)
    bar.set_ticks([float(np.log2(value)) for value in ticks], labels=list(ticks.values()))
    bar.set_label("load / mean of the layer")
    bar.outline.set_edgecolor(FAINT)


def amount_map(axes: Axes, map_RC: FloatArray, most: float, form: str) -> AxesImage:
    """Amounts from 0 to `most`, with their numbers where there is room.

    Those on the diagonal stay inside: they have numbers, but no part in the colours.
    """
    inside = on_diagonal(map_RC)
    shown = coarse(np.where(inside, np.nan, map_RC), 64, 64)[0]
    norm = Normalize(0, most or 1)
    image = _cells(axes, shown, map_RC.shape, AMOUNT_MAP, norm)
    if max(map_RC.shape) <= FEW:
        for (row, column), value in np.ndenumerate(map_RC):
            if np.isfinite(value):
                on = INK if inside[row, column] else readable_on(AMOUNT_MAP(norm(value)))
                text = format(value, form)
                axes.text(column, row, text, color=on, ha="center", va="center", fontsize=8)
    return image


def on_diagonal(map_RC: FloatArray) -> NDArray[np.bool_]:
    """[R, C]: what goes from something to itself."""
    rows, columns = np.indices(map_RC.shape)
    return np.asarray(rows == columns)


def _cells(
    axes: Axes,
    shown: FloatArray,
    shape: tuple[int, ...],
    colours: Colormap,
    norm: Normalize,
) -> AxesImage:
    """Cells as an image in the units of the whole map, whatever each stands for."""
    rows, columns = shape
    image = axes.imshow(
        np.ma.masked_invalid(shown),
        cmap=colours,
        norm=norm,
        aspect="auto",
        interpolation="none",
        extent=(-0.5, columns - 0.5, rows - 0.5, -0.5),
    )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(True)
    return image


def node_lines(axes: Axes, num_ranks: int, ranks_per_node: int | None) -> None:
    """Thin lines between the nodes' ranks, where there are few enough to tell apart."""
    if not ranks_per_node or num_ranks // ranks_per_node > 20:
        return
    for first in range(ranks_per_node, num_ranks, ranks_per_node):
        axes.axhline(first - 0.5, color=INK, linewidth=0.4, alpha=0.5)


def _several(what: str, each: int) -> str:
    return what if each == 1 else f"{what} (the busiest of each {each:,})"
