"""What is drawn of `simulate serve`: one function a picture, each fills a figure."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from simulations.report.fronts import front_of
from simulations.report.serve_result import Event, ParetoPoint, ServeResult, Spread
from simulations.report.style import BLUE, FAINT, GREEN, GREY, INK, ORANGE, PINK, RED, SKY, short
from simulations.report.values import FloatArray

EVENT_LOOKS: dict[str, tuple[str, Any]] = {
    "failure": (RED, "-"),
    "recovery": (GREEN, "--"),
    "rebalance": (PINK, ":"),
}
MAX_MARKS = 400
NOT_USES = ("capacity", "total", "free")  # entries of a result's memory that nothing is kept in
USE_COLOURS = (BLUE, SKY, ORANGE, GREEN, PINK, RED, GREY)


def latencies(figure: Figure, result: ServeResult) -> None:
    """Cumulative distributions of the time to the first token, and of that to each other."""
    panels = figure.subplots(1, 2, sharey=True)
    cdf = result.cdf
    _distribution(panels[0], cdf.ttft_s, cdf.q, result.ttft_s, 1, "s")
    _distribution(panels[1], cdf.tpot_s, cdf.q, result.tpot_s, 1000, "ms")
    panels[0].set(ylabel="requests (%)", xlabel="TTFT: time to first token (s)")
    panels[1].set(xlabel="TPOT: time per output token (ms)")


def _distribution(
    axes: Axes, seconds: FloatArray, q: FloatArray, spread: Spread, scale: float, unit: str
) -> None:
    """The curve, with the median and the 99th percentile marked; times in 1/scale seconds."""
    if seconds.size:
        marker = "o" if seconds.size == 1 else None
        axes.plot(scale * seconds, q, color=BLUE, marker=marker, zorder=3)
    named = {"p50": scale * spread.p50, "p99": scale * spread.p99}
    named = {name: value for name, value in named.items() if np.isfinite(value)}
    for value, dashes in zip(named.values(), ("--", ":"), strict=False):
        axes.axvline(value, color=INK, linestyle=dashes, linewidth=1.1)
    axes.set_title(", ".join(f"{name} {value:,.3g} {unit}" for name, value in named.items()))
    axes.set_ylim(0, 101)
    axes.grid(visible=True)


def over_time(figure: Figure, result: ServeResult) -> None:
    """Tokens, requests, cache and balance by time, with failures and the like marked."""
    series = result.series
    rows = [
        ("output\n(tokens/s)", {"": (series.output_tokens_per_s, BLUE, "-")}),
        (
            "requests",
            {"running": (series.running, BLUE, "-"), "waiting": (series.waiting, ORANGE, "--")},
        ),
        ("cache used\n(%)", {"": (100 * series.kv_usage, BLUE, "-")}),
        ("balancedness\n(mean / max)", {"": (series.balancedness, BLUE, "-")}),
    ]
    shown = [
        (label, {name: curve for name, curve in curves.items() if curve[0].size})
        for label, curves in rows
    ]
    shown = [(label, curves) for label, curves in shown if curves]
    panels = figure.subplots(len(shown), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (label, curves) in zip(panels, shown, strict=True):
        for name, (values, colour, dashes) in curves.items():
            marker = "o" if values.size == 1 else None
            axes.plot(
                series.time_s, values, color=colour, linestyle=dashes, marker=marker, label=name
            )
        axes.set_ylabel(label)
        axes.grid(visible=True)
        axes.margins(x=0.01)
        if label != rows[-1][0]:
            axes.set_ylim(0, None)
            axes.yaxis.set_major_formatter("{x:,g}")
        if len(curves) > 1:
            axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    panels[-1].set_xlabel("time (s)")
    figure.align_ylabels(panels)
    _mark(figure, panels, result.events)


def _mark(figure: Figure, panels: Iterable[Axes], events: Sequence[Event]) -> None:
    """Lines through all panels where something happened, and what their looks mean."""
    kinds: dict[str, int] = {}
    for event in events:
        if not np.isfinite(event.time_s):
            continue
        kinds[event.kind] = kinds.get(event.kind, 0) + 1
        if kinds[event.kind] > MAX_MARKS:
            continue
        colour, dashes = EVENT_LOOKS.get(event.kind, (FAINT, "-."))
        for axes in panels:
            axes.axvline(event.time_s, color=colour, linestyle=dashes, linewidth=1.1, zorder=1)
    handles = [
        Line2D([], [], color=look[0], linestyle=look[1], label=f"{short(kind)} ({count:,})")
        for kind, count in kinds.items()
        for look in [EVENT_LOOKS.get(kind, (FAINT, "-."))]
    ]
    if handles:
        figure.legend(handles=handles, loc="outside upper left", ncols=6)


def memory(figure: Figure, result: ServeResult) -> None:
    """One bar: what the memory of the fullest rank holds."""
    axes = figure.subplots()
    left = 0.0
    uses = {k: v / 1e9 for k, v in result.memory.items() if k not in NOT_USES and v > 0}
    for i, (use, size) in enumerate(uses.items()):
        colour = USE_COLOURS[i % len(USE_COLOURS)]
        label = f"{short(use.replace('_', ' '))} {size:,.1f}"
        axes.barh(0, size, left=left, color=colour, height=0.6, label=label)
        left += size
    capacity = result.memory.get("capacity", np.nan) / 1e9
    if np.isfinite(capacity):
        axes.axvline(capacity, color=INK, linewidth=1.6, label=f"capacity {capacity:,.1f}")
    axes.set(xlabel="GB of the fullest rank", yticks=[], xlim=(0, None))
    axes.spines["left"].set_visible(False)
    figure.legend(loc="outside upper left", ncols=6)


def pareto(figure: Figure, points: Sequence[ParetoPoint]) -> None:
    """Throughput of a rank against the speed that a user sees, by concurrency."""
    axes = figure.subplots()
    pairs = {point: (point.tokens_per_s_per_user, point.tokens_per_s_per_rank) for point in points}
    pairs = {point: pair for point, pair in pairs.items() if np.isfinite(sum(pair))}
    front = front_of(list(pairs.values()))
    axes.plot(*zip(*front, strict=True), color=BLUE, linewidth=1.2)
    filled = [BLUE if pair in front else "none" for pair in pairs.values()]
    x, y = zip(*pairs.values(), strict=True)
    axes.scatter(x, y, s=42, edgecolors=BLUE, facecolors=filled, zorder=3)
    for point, pair in pairs.items():
        if np.isfinite(point.concurrency):
            axes.annotate(
                f"{point.concurrency:,.0f}", pair, xytext=(6, 5), textcoords="offset points",
                fontsize=9,
            )  # fmt: skip
    axes.set(xlabel="tokens/s of each user", ylabel="tokens/s of each rank", ylim=(0, None))
    axes.set_xlim(0, None)
    axes.yaxis.set_major_formatter("{x:,g}")
    axes.margins(0.08)
    axes.grid(visible=True)
