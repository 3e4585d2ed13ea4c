"""The waterfall of a layer: its stages as bars, each beginning where the last one ended."""

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from simulations.report.balance_result import BalanceResult
from simulations.report.panels import panels_of
from simulations.report.style import FAINT, INK, colour_of, label_of, short

COMPUTE = ("attention", "gate", "shared", "experts")
STAGES = ("attention", "gate", "shared", "dispatch", "experts", "combine")


def waterfall(figure: Figure, result: BalanceResult) -> None:
    """Where a MoE layer's time goes, stage after stage, one panel for each policy."""
    names = [name for name, policy in result.policies.items() if policy.layer_ms]
    panels = panels_of(figure, len(names), columns=2, share=True)
    for axes, name in zip(panels, names, strict=False):
        end = _cascade(axes, result.policies[name].layer_ms, colour_of(name, result.policies))
        axes.set_title(f"{short(label_of(name))}: {end:,.3f} ms a layer")
        axes.grid(visible=True, axis="x")
    for axes in panels:
        axes.set_yticks(range(len(STAGES)), labels=STAGES)
        axes.set_ylim(len(STAGES) - 0.4, -0.6)
        axes.margins(x=0.09)
    handles = [
        Patch(facecolor=FAINT, label="computation"),
        Patch(facecolor="none", edgecolor=INK, hatch="////", label="exposed communication"),
        Patch(facecolor="none", edgecolor=FAINT, linestyle=":", label="hidden communication"),
    ]
    figure.legend(handles=handles, loc="outside upper left", ncols=3)
    figure.supxlabel("milliseconds of one MoE layer", fontsize=10)


def _cascade(axes: Axes, layer_ms: Mapping[str, float], colour: str) -> float:
    """Bars that begin where the last one ended; hidden communication lies under what hides it.

    Of each exchange the same share is hidden, which is all that a result tells. Returns the end.
    """
    known = {stage: max(0.0, np.nan_to_num(layer_ms.get(stage, 0.0))) for stage in STAGES}
    hidden_ms = max(0.0, np.nan_to_num(layer_ms.get("hidden", 0.0)))
    exchanged = known["dispatch"] + known["combine"]
    hidden_share = min(1.0, hidden_ms / exchanged) if exchanged else 0.0
    now = 0.0
    for row, stage in enumerate(STAGES):
        took = known[stage]
        hidden = 0.0 if stage in COMPUTE else took * hidden_share
        if hidden:
            axes.barh(
                row, hidden, left=max(0.0, now - hidden), height=0.62,
                facecolor="none", edgecolor=FAINT, linestyle=":", linewidth=1.2,
            )  # fmt: skip
        if stage in COMPUTE:
            axes.barh(row, took, left=now, height=0.62, color=colour)
        else:
            axes.barh(
                row, took - hidden, left=now, height=0.62,
                facecolor="none", edgecolor=colour, hatch="////", linewidth=1.0,
            )  # fmt: skip
        now += took - hidden
        if took:
            axes.annotate(
                f"{took:.3f}", (now, row), xytext=(4, 0), textcoords="offset points",
                va="center", fontsize=8.5,
            )  # fmt: skip
    return now
