"""What `expertmesh simulate serve` prints, in 80 columns."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from deploy.simulate.warnings_shown import shown_warnings

SHOWN_REBALANCES = 8


def show(result: dict[str, Any], seconds: float) -> None:
    """`seconds`: what it took to simulate."""
    cluster, requests, rates = result["cluster"], result["requests"], result["throughput"]
    print(
        f"{result['model']['name']}, {cluster['num_nodes']} x {cluster['ranks_per_node']} "
        f"ranks, attention replicas: {cluster['num_replicas']}, policy {cluster['policy']},\n"
        f"calibration {result['calibration']['name']} {result['calibration']['hash']}"
    )
    rows = {
        "requests": ", ".join(f"{number:,} {what}" for what, number in requests.items() if number),
        "time to first token": _times(result["ttft_s"], 1, "s"),
        "time per output token": _times(result["tpot_s"], 1e3, "ms"),
        "output": f"{rates['output_tokens_per_s']:,.0f} tokens/s, "
        f"{rates['tokens_per_s_per_rank']:,.1f} per rank"
        + (
            f", {rates['tokens_per_s_per_user']:,.1f} per user"
            if rates["tokens_per_s_per_user"]
            else ""
        ),
        "memory of a rank": _memory(result["memory"]),
        "KV cache in use": _peak(result["series"]["kv_usage"]),
        "simulated": f"{result['duration_s']:,.1f} s in {seconds:,.1f} s, {result['steps']:,} steps, "
        f"{rates['total_tokens_per_s'] * result['duration_s'] / max(seconds, 1e-9):,.0f} tokens "
        "per second",
    }
    table = Table.grid(padding=(0, 2))
    for name, value in rows.items():
        table.add_row(name, value)
    console = Console(width=80, highlight=False)
    console.print(table)
    _show_events(console, result["events"])
    if result["pareto"]:
        console.print(_pareto_table(result["pareto"]))
    for line in shown_warnings(result["warnings"]):
        console.print(line)
    if result.get("interrupted"):
        console.print("interrupted: this is what was done until then")


def _show_events(console: Console, events: list[dict[str, Any]]) -> None:
    """Of rebalances the first few, of ranks all."""
    rebalances = [event for event in events if event["kind"] == "rebalance"]
    table = Table.grid(padding=(0, 2))
    table.add_column(justify="right")
    for event in events:
        if event["kind"] != "rebalance" or event in rebalances[:SHOWN_REBALANCES]:
            table.add_row(f"{event['time_s']:,.1f} s", event["kind"], event["what"])
    console.print(table)
    if len(rebalances) > SHOWN_REBALANCES:
        console.print(f"and {len(rebalances) - SHOWN_REBALANCES} more rebalances")


def _times(spread: dict[str, float | None], scale: float, unit: str) -> str:
    if spread["mean"] is None:
        return "none"
    shown = (f"{name} {_short((value or 0) * scale)}" for name, value in spread.items())
    return f"{', '.join(shown)} {unit}"


def _short(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _memory(memory: dict[str, float]) -> str:
    parts = ("replicated", "experts", "kv", "activations", "buffers", "free")
    shown = (f"{part} {memory[part] / 1e9:.1f}" for part in parts)
    return f"{memory['capacity'] / 1e9:.1f} GB: {', '.join(shown)}"


def _peak(usage: list[float]) -> str:
    return f"{max(usage):.1%} at most" if usage else "none"


def _pareto_table(points: list[dict[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False)
    for heading in ("users", "tokens/s per user", "tokens/s per rank", "first token p50"):
        table.add_column(heading, justify="right")
    for point in points:
        per_user = point["tokens_per_s_per_user"]
        table.add_row(
            f"{point['concurrency']:,}",
            f"{per_user:,.1f}" if per_user else "–",
            f"{point['tokens_per_s_per_rank']:,.1f}",
            f"{point['ttft_p50_s']:,.3g} s",
        )
    return table
