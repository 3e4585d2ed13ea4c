"""What is drawn of `simulate scoreboard`: predictions beside what was published."""

from collections.abc import Sequence

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
    """Predicted against published; each in its unit, so only the distance to the line tells."""
    axes = figure.subplots()
    for blind, (colour, marker, label) in LOOKS.items():
        mine = [target for target in targets if target.blind == blind]
        if mine:
            x, y = [t.published for t in mine], [t.predicted for t in mine]
            axes.scatter(x, y, color=colour, marker=marker, s=34, label=label, zorder=3)
    lowest = min(min(t.published, t.predicted) for t in targets) / 1.6
    highest = max(max(t.published, t.predicted) for t in targets) * 1.6
    line = np.geomspace(lowest, highest, 2)
    for share in reversed(WITHIN):
        label = f"within ±{share:.0%}"
        axes.fill_between(
            line, line * (1 - share), line * (1 + share),
            color=FAINT, alpha=0.25, linewidth=0, label=label,
        )  # fmt: skip
    axes.plot(line, line, color=INK, linewidth=0.9, label="predicted = published")
    axes.set(xscale="log", yscale="log", xlim=(lowest, highest), ylim=(lowest, highest))
    axes.set(xlabel="published (each in its own unit)", ylabel="predicted")
    axes.set_aspect("equal")
    axes.grid(visible=True)
    axes.legend(loc="upper left")


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
    labels = [short(f"{target.id}  {target.what}") for target in targets]
    axes.set_yticks(rows, labels=labels)
    reach = max(12.0, 1.1 * float(np.nanmax(np.abs(errors), initial=0)))
    axes.set(ylim=(len(targets) - 0.4, -0.6), xlim=(-reach, reach))
    axes.set_xlabel("error of the prediction (%); bands: ±5 %, ±10 %")
    axes.grid(visible=True, axis="x")
    handles = [
        Line2D([], [], color=colour, marker=marker, linestyle="", label=label)
        for colour, marker, label in LOOKS.values()
    ]
    figure.legend(handles=handles, loc="outside upper left", ncols=2)
