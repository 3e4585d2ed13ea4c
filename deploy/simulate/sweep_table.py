"""A sweep in 80 columns: the best points, how all others compare, and what does not fit."""

from __future__ import annotations

from textwrap import fill
from typing import Any

from rich.console import Console
from rich.table import Table

from deploy.simulate.warnings_shown import shown_warnings

MOST_ROWS = 24
MOST_REFUSALS = 8
AXES = {
    "num_nodes": "nodes",
    "ranks_per_node": "ranks",
    "num_redundant_experts": "spare",
    "tokens_per_rank": "batch",
    "context": "context",
    "overlap": "overlap",
    "policy": "policy",
}
_BEST = {
    "throughput": "most tokens/s",
    "tokens_per_s_per_rank": "most tokens/s per rank",
}


def show(console: Console, result: dict[str, Any]) -> None:
    """Print it: points that run, best per rank first; then the others; then the best of all."""
    points = result["points"]
    varying = [axis for axis, values in result["grid"].items() if len(values) > 1]
    axes = [axis for axis in AXES if axis in varying] or ["num_nodes", "policy"]
    ran = [entry for entry in points if entry["result"]["status"] == "ok"]
    ran.sort(key=lambda entry: -float(entry["result"]["tokens_per_s_per_rank"]))
    if ran:
        console.print(_table(ran[:MOST_ROWS], axes))
        fixed = [f"{AXES[axis]} {result['grid'][axis][0]}" for axis in AXES if axis not in axes]
        print(f"{', '.join(fixed)}")
        print("batch: sequences per rank; GB: left of a rank's memory")
        if len(ran) > MOST_ROWS:
            print(f"{len(ran) - MOST_ROWS} more points are below these; --json has all")
    _refusals(points)
    _best(result)
    for line in shown_warnings(result["warnings"]):
        print(fill(line, 80, subsequent_indent="  "))


def _table(entries: list[dict[str, Any]], axes: list[str]) -> Table:
    figures = ("tokens/s", "per rank", "ms", "p99", "max/mean", "GB")
    table = Table(*(AXES[axis] for axis in axes), padding=(0, 1, 0, 0))
    for title in figures:
        table.add_column(title, justify="right")
    for entry in entries:
        found = entry["result"]
        table.add_row(
            *(str(entry["point"][axis]) for axis in axes),
            f"{found['throughput']:,.0f}",
            f"{found['tokens_per_s_per_rank']:,.0f}",
            f"{found['tpot_ms']:.1f}",
            f"{found['step_ms_p99']:.1f}",
            f"{found['imbalance_mean']:.3f}",
            f"{found['free_bytes'] / 1e9:.1f}",
        )
    return table


def _refusals(points: list[dict[str, Any]]) -> None:
    """Layouts that cannot be and those that do not fit, each once, whatever the policy."""
    lines: dict[str, None] = {}
    for entry in points:
        point, found = entry["point"], entry["result"]
        if found["status"] == "impossible":
            lines[f"impossible: {found['why']}"] = None
        elif found["status"] == "does not fit":
            lines[
                f"does not fit: {_cluster(point)}, context {point['context']}: "
                f"{found['missing_bytes'] / 1e9:.1f} GB too much"
            ] = None
    for line in list(lines)[:MOST_REFUSALS]:
        print(fill(line, 80, subsequent_indent="  "))
    if len(lines) > MOST_REFUSALS:
        print(f"and {len(lines) - MOST_REFUSALS} more layouts that cannot be: see --json")


def _best(result: dict[str, Any]) -> None:
    limit = f"within {result['tpot_ms']:g} ms per token"
    for figure, what in _BEST.items():
        for key, condition in ((figure, "at all"), (f"{figure}_within_tpot", limit)):
            place = result["best"][key]
            if place is None:
                print(f"{what} {condition}: no point")
                continue
            entry = result["points"][place]
            point, found = entry["point"], entry["result"]
            print(
                f"{what} {condition}: {found[figure]:,.0f} in {found['tpot_ms']:.1f} ms\n"
                f"    {_cluster(point)}, {point['policy']}"
            )


def _cluster(point: dict[str, Any]) -> str:
    return (
        f"{point['num_nodes']} x {point['ranks_per_node']} ranks, "
        f"{point['num_redundant_experts']} spare, batch {point['tokens_per_rank']}"
    )
