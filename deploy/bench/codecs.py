"""`expertmesh bench codecs`: bytes against error, and whether the associative sum is as good."""

import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from cluster.model.errors import CheckpointError, UnsupportedModelError
from deploy.json_file import write_json
from deploy.settings import BUNDLED_MODELS
from simulations.bench import bench_codecs


def codecs_command(model: Path | None, json_file: Path | None) -> int:
    """Print and write the report; 2 for a directory that is no checkpoint with experts."""
    try:
        report = bench_codecs.run(model or BUNDLED_MODELS["mosaic"])
    except (CheckpointError, UnsupportedModelError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    console = Console()
    console.print(_errors_table(report["codecs"]))
    console.print(_speed_table(report["speed"]))
    for source, by_nodes in report["sums"].items():
        for nodes, ways in by_nodes.items():
            console.print(_sums_table(f"partial sums, {source}, {nodes} nodes", ways))
    write_json(json_file, report)
    return 0


def _errors_table(codecs: dict[str, Any]) -> Table:
    sources = list(codecs["bfloat16"]["relative_l2"])
    table = Table("codec", "bytes", *sources, title="relative L2 of a row, median")
    for name, row in codecs.items():
        errors = [f"{row['relative_l2'][source]['median']:.1e}" for source in sources]
        table.add_row(name, f"{row['bytes_per_element']:.3f}", *errors)
    return table


def _speed_table(speed: dict[str, Any]) -> Table:
    table = Table("GB/s", "encode", "decode", title="bfloat16 rows, one thread")
    for name, row in speed.items():
        table.add_row(name, *(f"{gb_per_s:.2f}" for gb_per_s in row.values()))
    return table


def _sums_table(title: str, ways: dict[str, Any]) -> Table:
    table = Table("way", "bytes", "median", "p95", "worst", "escapes", "refused", title=title)
    for way, row in ways.items():
        errors = [f"{row['relative_l2'][key]:.1e}" for key in ("median", "p95", "worst")]
        table.add_row(
            way,
            f"{row['bytes_per_element']:.3f}",
            *errors,
            f"{row['escape_rate']:.1e}",
            str(row["refused_rows"]),
        )
    return table
