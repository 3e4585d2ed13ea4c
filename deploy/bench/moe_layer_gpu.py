"""`expertmesh bench experts --layer`: a whole expert layer on a GPU, its floor, and where its time goes."""

import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from deploy.json_file import write_json
from simulations.bench import bench_moe_gpu


def layer_command(hidden: int, intermediate: int, dtypes: list[str], json_file: Path | None) -> int:
    """reports[].cases[].{layer_us,floor_us,over_floor,parts_us,...}; 1 without a GPU or Triton."""
    try:
        reports = [
            bench_moe_gpu.run(hidden=hidden, intermediate=intermediate, dtype=dtype)
            for dtype in dtypes
        ]
    except (RuntimeError, ImportError) as error:
        print(error, file=sys.stderr)
        return 1
    for report in reports:
        _print(report)
    write_json(json_file, {"reports": reports})
    return 0


def _print(report: dict[str, Any]) -> None:
    cases = report["cases"]
    title = f"{report['device']}, {report['dtype']}, one of {report['cards']} cards: microseconds"
    table = Table("", title=title, padding=(0, 1, 0, 0))
    for case in cases:
        table.add_column(f"{case['tokens']} tokens a card", justify="right")
    table.add_row("rows / pairs here", *[f"{c['rows']:.0f} / {c['pairs']:.0f}" for c in cases])
    table.add_row("layer", *[f"{c['layer_us']:.0f}" for c in cases])
    table.add_row("  on one stream", *[f"{c['one_stream_us']:.0f}" for c in cases])
    table.add_row("floor", *[f"{c['floor_us']:.0f}" for c in cases])
    table.add_row("layer / floor", *[f"{c['over_floor']:.2f}" for c in cases])
    for part in cases[0]["parts_us"]:
        times = [f"{c['parts_us'][part]:.1f} ({100 * c['share'][part]:.0f} %)" for c in cases]
        table.add_row(f"{part}, alone", *times)
    even = [f"{c['experts_with_even_counts_us']:.1f}" for c in cases]
    table.add_row("experts, alone, with even counts", *even)
    Console().print(table)
