"""What is drawn of `simulate balance`: one function a picture, each fills a figure.

L MoE layers, E experts, R ranks, N nodes.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from simulations.report.balance_result import BalanceResult, BeforeAfter
from simulations.report.heat_maps import (
    EXPERT_TICKS,
    RANK_TICKS,
    amount_map,
    load_map,
    load_scale,
    node_lines,
    on_diagonal,
)
from simulations.report.panels import panels_of
from simulations.report.style import FAINT, INK, colour_of, dashes_of, label_of, short
from simulations.report.values import FloatArray

PaintMap = Callable[[Axes, FloatArray], None]

KIB = 1024
WHEN = {"before": "first tenth of the run", "after": "last tenth"}


def over_time(figure: Figure, result: BalanceResult) -> None:
    """Served balancedness, throughput and rebalances of every policy, by step."""
    names = [name for name, policy in result.policies.items() if policy.series.step.size]
    moved = [name for name in names if result.policies[name].rebalances]
    heights = [3.0, 3.0] + ([0.25 + 0.25 * len(moved)] if moved else [])
    axes = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights, squeeze=False)[:, 0]
    for name in names:
        series = result.policies[name].series
        look = _line_look(name, result, len(series.step))
        for panel, values in zip(axes, (series.balancedness, series.throughput), strict=False):
            if values.size:
                panel.plot(series.step, values, label=short(label_of(name)), **look)
    axes[0].set(ylabel="balancedness\n(mean / max over ranks)")
    axes[1].set(ylabel="throughput\n(tokens/s)", ylim=(0, None))
    axes[1].yaxis.set_major_formatter("{x:,.0f}")
    for panel in axes:
        panel.margins(x=0.01)
    for panel in axes[:2]:
        panel.grid(visible=True)
    figure.align_ylabels(axes[:2])
    if moved:
        _rebalance_marks(axes[2], result, moved)
    axes[-1].set_xlabel("step")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=5)


def _rebalance_marks(axes: Axes, result: BalanceResult, moved: Sequence[str]) -> None:
    """A row of ticks for each policy: when it moved experts."""
    for row, name in enumerate(moved):
        steps = [rebalance.step for rebalance in result.policies[name].rebalances]
        colour = colour_of(name, result.policies)
        axes.plot(steps, [row] * len(steps), "|", color=colour, markersize=9, mew=1.4)
    axes.set_yticks(range(len(moved)), labels=[short(label_of(name)) for name in moved])
    axes.set(ylim=(len(moved) - 0.4, -0.6), title="rebalances")
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=True, axis="x")


def planned_against_served(figure: Figure, result: BalanceResult) -> None:
    """For each policy, what its plan promised and what the steps had."""
    names = [
        name
        for name, policy in result.policies.items()
        if policy.series.balancedness.size and policy.series.planned_balancedness.size
    ]
    panels = panels_of(figure, len(names), columns=3, share=True)
    for axes, name in zip(panels, names, strict=False):
        series = result.policies[name].series
        colour = colour_of(name, result.policies)
        planned, served = series.planned_balancedness, series.balancedness
        axes.fill_between(series.step, served, planned, color=colour, alpha=0.18, linewidth=0)
        axes.plot(series.step, planned, color=INK, linewidth=1.1, linestyle=(0, (3, 1.5)))
        axes.plot(series.step, served, color=colour, marker="o" if len(served) == 1 else None)
        axes.set_title(short(label_of(name)))
        axes.grid(visible=True)
    handles = [
        Patch(facecolor="none", edgecolor=INK, linestyle="--", label="planned (dashed)"),
        Patch(facecolor=FAINT, label="served (solid)"),
    ]
    figure.legend(handles=handles, loc="outside upper left", ncols=2)
    figure.supxlabel("step", fontsize=10)
    figure.supylabel("balancedness (mean / max)", fontsize=10)


def rank_loads(figure: Figure, result: BalanceResult, loads: BeforeAfter) -> None:
    """Rank x layer, the first tenth of the run beside the last."""

    def paint(axes: Axes, map_LR: FloatArray) -> None:
        load_map(axes, map_LR.T, RANK_TICKS, rows="rank", columns="MoE layer")
        node_lines(axes, map_LR.shape[1], result.count("ranks_per_node"))

    load_scale(figure, _side_by_side(figure, loads, "rank", paint), RANK_TICKS)


def expert_loads(figure: Figure, result: BalanceResult) -> None:
    """Layer x expert: what the gates chose, which no policy changes."""

    def paint(axes: Axes, map_LE: FloatArray) -> None:
        load_map(axes, map_LE, EXPERT_TICKS, rows="MoE layer", columns="expert")

    load_scale(figure, _side_by_side(figure, result.expert_load_LE, "expert", paint), EXPERT_TICKS)


def _side_by_side(figure: Figure, loads: BeforeAfter, one: str, paint: PaintMap) -> list[Axes]:
    """The maps that are known beside each other, with how busy the busiest of each is."""
    maps = loads.known()
    panels: list[Axes] = list(figure.subplots(1, len(maps), sharey=True, squeeze=False)[0])
    for axes, (when, map_LX) in zip(panels, maps.items(), strict=True):
        paint(axes, map_LX)
        most = f"busiest {one} {np.nanmax(map_LX, initial=0):.2f} × mean"
        axes.set_title(f"{WHEN[when]}: {most}" if len(maps) > 1 else most)
        axes.label_outer()
    return panels


def node_traffic(figure: Figure, result: BalanceResult) -> None:
    """Bytes from each node to each other one, per token, of every policy on one scale."""
    maps = {
        name: policy.node_traffic_NN / KIB
        for name, policy in result.policies.items()
        if policy.node_traffic_NN.size
    }
    between = {name: np.nansum(map_NN[~on_diagonal(map_NN)]) for name, map_NN in maps.items()}
    most = max(np.nanmax(map_NN[~on_diagonal(map_NN)], initial=0) for map_NN in maps.values())
    panels = panels_of(figure, len(maps), columns=3, share=True)
    for axes, (name, map_NN) in zip(panels, maps.items(), strict=False):
        image = amount_map(axes, map_NN, most, ".2f" if most < 10 else ".1f")
        axes.set_aspect("equal")
        axes.set_title(f"{short(label_of(name))}: {between[name]:,.1f} KiB")
    figure.supxlabel("to node", fontsize=10)
    figure.supylabel("from node", fontsize=10)
    figure.colorbar(image, ax=panels, label="KiB per token", aspect=30, pad=0.015, fraction=0.03)


def _line_look(name: str, result: BalanceResult, length: int) -> dict[str, Any]:
    """Colour and dashes of a policy; a curve of a single point is drawn as a point."""
    return {
        "color": colour_of(name, result.policies),
        "linestyle": dashes_of(name, result.policies),
        "marker": "o" if length == 1 else None,
    }
