"""`expertmesh bench balance`: run, show, write the JSON."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from deploy.json_file import write_json
from simulations.bench import bench_balance
from simulations.bench.balance_real import MOVES_PER_BATCH

TIGHT = (0, 1, 0, 0)


def balance_command(sections: Sequence[str], trace: Path | None, json_file: Path | None) -> int:
    """Print and write the report; 2 for sections or traces that cannot be."""
    try:
        with Console(stderr=True).status("") as status:
            report = bench_balance.run(sections, trace, status.update)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    console = Console()
    for name, show in TABLES.items():
        if name in report:
            console.print(show(report[name]))
    if "seconds" in report:
        plan, split = report["seconds"]["plan"], report["seconds"]["split"]
        print(
            f"58 layers of 256 experts on 64 ranks: planned in {1000 * plan:.0f} ms of one core;"
            f" a batch of one layer divided in {1000 * split:.2f} ms"
        )
    if "skipped" in report:
        names = " and ".join(report["skipped"])
        print(f"left out: {names}, which need recorded routing (--trace FILE.npz)")
    write_json(json_file, report)
    return 0


def _planned(report: dict[str, Any]) -> Table:
    workloads = list(report["A"])
    title = "planned max/mean: ours, EPLB below, ours (max - min)/mean in %"
    table = Table("", *workloads, title=title, padding=TIGHT)
    for config, row in report.items():
        cells = [row[workload] for workload in workloads]
        table.add_row(config, *(f"{cell['ours']:.3f}" for cell in cells))
        table.add_row("", *(f"{cell['eplb']:.3f}" for cell in cells))
        table.add_row("", *(f"{100 * cell['difference']:.2f}" for cell in cells), end_section=True)
    return table


def _served(report: dict[str, Any]) -> Table:
    title = "served max/mean, 65,536 pairs a batch, 64 ranks"
    columns = ("jitter", "mean", "p99", "EPLB", "p99", "EPLB, our split", "p99")
    table = Table(*columns, title=title, padding=TIGHT)
    for jitter, row in report.items():
        table.add_row(
            jitter,
            *(
                f"{row[prefix + key]:.3f}"
                for prefix in ("", "eplb_", "eplb_split_")
                for key in ("mean", "p99")
            ),
        )
    return table


def _real(report: dict[str, Any]) -> Table:
    title = (
        f"recorded routing, batches of 1,024 tokens, 16 x 5 slots, {MOVES_PER_BATCH} moves a batch"
    )
    table = Table("regime", "mean", "p99", "EPLB", "", title=title, padding=TIGHT)
    for regime, row in report.items():
        note = ""
        if "batches" in row:
            note = (
                f"{row['unmoved_mean']:.3f} if nothing moves; <= 1.10 after {row['batches']} "
                f"batches, later {row['above']:.0%} above"
            )
        figures = (
            "-" if row[key] is None else f"{row[key]:.3f}" for key in ("mean", "p99", "eplb_mean")
        )
        table.add_row(regime, *figures, note)
    return table


def _drift(report: dict[str, Any]) -> Table:
    title = "drift: moves per layer and step, 320 slots"
    columns = ("rho", "moves", "EPLB", "bytes", "max/mean", "p99")
    table = Table(*columns, title=title, padding=TIGHT)
    for rho, row in report.items():
        table.add_row(
            rho,
            f"{row['moves']:.2f}",
            f"{row['eplb_moves']:.0f}",
            f"{row['bytes_ratio']:.4f}x",
            f"{row['imbalance']:.3f}",
            f"{row['p99']:.3f}",
        )
    return table


def _sends(report: dict[str, Any]) -> Table:
    title = "recorded routing, 4 nodes x 4 ranks x 5 slots"
    table = Table("sends per token", "one per expert", "ratio", "max/mean", title=title)
    table.add_row(
        f"{report['per_token']:.3f}",
        f"{report['naive']:.3f}",
        f"{report['per_token'] / report['naive']:.3f}x",
        f"{report['imbalance']:.3f}",
    )
    return table


TABLES = {
    "planned": _planned,
    "served": _served,
    "real": _real,
    "drift": _drift,
    "sends": _sends,
}
