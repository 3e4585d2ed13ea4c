"""A heat map in text: ranks x expert layers, readable without colour.

Each cell is a load relative to the mean of its layer: a number where there is room, else a
character from a scale. What does not fit is put together: ranks of a node, then nodes; neighbouring
layers. A cell that stands for several shows the *busiest* of them, since a layer ends when its
busiest rank does.

R ranks, L expert layers, G groups of ranks (rows), B groups of layers (columns).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from rich.text import Text

FloatArray = NDArray[np.float64]

# A load relative to the mean is in class i when i of these are below it; class 3 is even.
EDGES = (0.5, 0.8, 0.95, 1.05, 1.2, 1.5, 2.0)
BLOCKS = "▁▂▃▄▅▆▇█"
ASCII = ",:-=+*%@"
STYLES = ("blue", "blue", "cyan", "green", "yellow", "bold yellow", "red", "bold red")
NUMBER_WIDTH = 5  # "1.02" and a space


@dataclass(frozen=True)
class Bin:
    """Positions of rows or columns that are shown as one."""

    label: str
    members: tuple[int, ...]


def relative(served_RL: FloatArray) -> FloatArray:
    """Each entry over the mean of its layer; NaN where a layer has no load at all."""
    relative_RL = np.full(served_RL.shape, np.nan)
    mean_L = served_RL.sum(axis=0) / max(1, len(served_RL))
    np.divide(served_RL, mean_L, out=relative_RL, where=mean_L > 0)
    return relative_RL


def rank_bins(nodes: Sequence[int], max_bins: int) -> list[Bin]:
    """Rows for the ranks on these nodes: each rank, else some of a node, else whole nodes."""
    by_node: dict[int, list[int]] = {}
    for rank, node in enumerate(nodes):
        by_node.setdefault(node, []).append(rank)
    for size in range(1, max(map(len, by_node.values()), default=0) + 1):
        if sum(-(-len(ranks) // size) for ranks in by_node.values()) <= max_bins:
            return [
                Bin(_label("r", chunk), tuple(chunk))
                for ranks in by_node.values()
                for chunk in _chunks(ranks, size)
            ]
    return [
        Bin(_label("n", chunk), tuple(rank for node in chunk for rank in by_node[node]))
        for chunk in _chunks(sorted(by_node), -(-len(by_node) // max(1, max_bins)))
    ]


def even_bins(numbers: Sequence[int], max_bins: int) -> list[Bin]:
    """At most so many bins of equally many neighbours (the last of fewer), named by `numbers`."""
    size = max(1, -(-len(numbers) // max(1, max_bins)))
    return [
        Bin(_label("", [numbers[i] for i in chunk]), tuple(chunk))
        for chunk in _chunks(range(len(numbers)), size)
    ]


def busiest(relative_RL: FloatArray, rows: Sequence[Bin], columns: Sequence[Bin]) -> FloatArray:
    """[G, B]: the largest among each cell's members; NaN where all are NaN."""
    out_GB = np.full((len(rows), len(columns)), np.nan)
    for g, row in enumerate(rows):
        of_row_L = np.fmax.reduce(relative_RL[list(row.members)], axis=0)
        for b, column in enumerate(columns):
            out_GB[g, b] = np.fmax.reduce(of_row_L[list(column.members)])
    return out_GB


def cell_width(num_columns: int, room: int) -> int:
    """Characters for each of so many columns: 1, 2, or enough for a number and a space."""
    each = room // max(1, num_columns)
    return NUMBER_WIDTH if each >= NUMBER_WIDTH else max(1, min(2, each))


def header(columns: Sequence[Bin], width: int) -> Text:
    """Which layers the columns are: each of them, or where there is no room some."""
    if width == NUMBER_WIDTH:
        return Text("".join(f"{column.label:>4} " for column in columns), "dim")
    line, end = "", 0
    for i, column in enumerate(columns):
        first = column.label.partition("-")[0]
        if i * width >= end and i * width + len(first) <= len(columns) * width:
            line = line.ljust(i * width) + first
            end = i * width + len(first) + 6
    return Text(line, "dim")


def heat_line(loads_B: FloatArray, width: int, *, ascii_only: bool) -> Text:
    """One row of the map: relative loads as numbers or as characters of the scale."""
    line = Text()
    for load in loads_B.tolist():
        if math.isnan(load):
            cell, style = " " if ascii_only else "·", "dim"
        else:
            shade = sum(edge < load for edge in EDGES)
            cell, style = (ASCII if ascii_only else BLOCKS)[shade], STYLES[shade]
            if width == NUMBER_WIDTH:
                cell = short(load)
        line.append(f"{cell:>4} " if width == NUMBER_WIDTH else cell.ljust(width), style)
    return line


def balancedness_line(values_B: FloatArray, width: int) -> Text:
    """Mean / max over ranks as numbers, or as digits of tenths, with "=" from 0.995."""
    line = Text()
    for value in values_B.tolist():
        if math.isnan(value):
            cell, style = "-", "dim"
        else:
            value = min(1.0, max(0.0, value))
            style = "green" if value >= 0.95 else "yellow" if value >= 0.8 else "red"
            cell = "=" if value >= 0.995 else str(int(value * 10))
            if width == NUMBER_WIDTH:
                cell = f"{value:.2f}"
        line.append(f"{cell:>4} " if width == NUMBER_WIDTH else cell.ljust(width), style)
    return line


def scale(*, ascii_only: bool) -> Text:
    """The characters of `heat_line`, with the loads at which one follows the other."""
    line = Text()
    for shade, character in enumerate(ASCII if ascii_only else BLOCKS):
        line.append(character, STYLES[shade])
        if shade < len(EDGES):
            line.append(f"{EDGES[shade]:g}".lstrip("0"), "dim")
    return line


def short(value: float) -> str:
    """A figure in at most 4 characters: 0, 1.02, 12.3, 123, 1234, 12k, 1.2M."""
    if not math.isfinite(value) or value < 0:
        return "?"
    if value == 0:
        return "0"
    for digits, limit in ((2, 9.995), (1, 99.95), (0, 9999.5)):
        if value < limit:
            return f"{value:.{digits}f}"
    for suffix in "kMGTP":
        value /= 1000
        if value < 999.5:
            return f"{value:.1f}{suffix}" if value < 9.95 else f"{value:.0f}{suffix}"
    return "big"


def _chunks(values: Sequence[int], size: int) -> list[list[int]]:
    return [list(values[i : i + size]) for i in range(0, len(values), max(1, size))]


def _label(prefix: str, numbers: Sequence[int]) -> str:
    first, last = numbers[0], numbers[-1]
    return f"{prefix}{first}" if first == last else f"{prefix}{first}-{last}"
