"""What is drawn of `simulate scoreboard`: predictions beside what was published."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from simulations.report.other_results import Target
from simulations.report.style import BLUE, FAINT, INK, ORANGE, short

WITHIN = (0.05, 0.10)
LOOKS = {True: (BLUE, "o", "blind"), False: (ORANGE, "s", "in-sample")}


def usable(targets: Sequence[Target]) -> list[Target]:
    """Targets with both figures above zero, which a logarithmic scale needs."""
    return [target for target in targets if target.published > 0 and target.predicted > 0]


def scatter(figure: Figure, targets: Sequence[Target]) -> None:
    """Predicted against published, and the errors, which a scale of decades cannot show."""
    both, off = figure.subplots(1, 2)
    for blind, (colour, marker, label) in LOOKS.items():
        mine = [target for target in targets if target.blind == blind]
        if mine:
            published = np.array([target.published for target in mine])
            predicted = np.array([target.predicted for target in mine])
            look: dict[str, Any] = {"color": colour, "marker": marker, "s": 32, "zorder": 3}
            both.scatter(published, predicted, label=label, **look)
            off.scatter(published, 100 * (predicted / published - 1), **look)
    values = [value for t in targets for value in (t.published, t.predicted)]
    ends = np.array([min(values) / 1.6, max(values) * 1.6])
    for share in reversed(WITHIN):
        band: dict[str, Any] = {"color": FAINT, "alpha": 0.25, "linewidth": 0}
        both.fill_between(ends, ends * (1 - share), ends * (1 + share), **band)
        off.axhspan(-100 * share, 100 * share, **band)
    both.plot(ends, ends, color=INK, linewidth=0.9)
    off.axhline(0, color=INK, linewidth=0.9)
    both.set(xscale="log", yscale="log", xlim=ends, ylim=ends, ylabel="predicted")
    off.set(xscale="log", xlim=ends, ylabel="error (%); bands: ±5 %, ±10 %")
    for axes in (both, off):
        axes.set_xlabel("published (each in its own unit)")
        axes.grid(visible=True)
        axes.xaxis.set_major_formatter("{x:,g}")
    both.yaxis.set_major_formatter("{x:,g}")
    figure.legend(loc="outside upper left", ncols=4)


def errors(figure: Figure, targets: Sequence[Target]) -> None:
    """The error of each target on one axis, with bands of 5 and 10 %."""
    axes = figure.subplots()
    rows = np.arange(len(targets))
    errors = np.array([100 * target.error for target in targets])
    for share in reversed(WITHIN):
        axes.axvspan(-100 * share, 100 * share, color=FAINT, alpha=0.18, linewidth=0)
    axes.axvline(0, color=INK, linewidth=0.9)
    for row, error, target in zip(rows, errors, targets, strict=True):
        colour, marker, _ = LOOKS[target.blind]
        axes.plot([0, error], [row, row], color=colour, linewidth=1.2)
        axes.plot([error], [row], marker=marker, color=colour, markersize=6)
    axes.set_yticks(rows, labels=[short(t.what or t.id, 44) for t in targets], fontsize=8.5)
    reach = max(12.0, 1.1 * float(np.nanmax(np.abs(errors), initial=0)))
    axes.set(ylim=(len(targets) - 0.4, -0.6), xlim=(-reach, reach))
    axes.set_xlabel("error of the prediction (%); bands: ±5 %, ±10 %")
    axes.grid(visible=True, axis="x")
    handles = [
        Line2D([], [], color=colour, marker=marker, linestyle="", label=label)
        for colour, marker, label in LOOKS.values()
    ]
    figure.legend(handles=handles, loc="outside upper left", ncols=2)
