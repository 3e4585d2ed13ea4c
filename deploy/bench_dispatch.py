"""`expertmesh bench dispatch`: run it, show the table, write the JSON."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from deploy.bench import write_json
from simulations import bench_dispatch
from simulations.testbed import TestbedError


def dispatch_command(
    workload: dict[str, Any],
    schemes: Sequence[str],
    repeats: int,
    inter_node_backend: str,
    json_file: Path | None,
) -> int:
    """schemes.<name>.{wire_bytes,ledger_bytes,seconds_median,seconds_p95,rel_l2}; 2 for options
    that cannot be, 1 where hosts cannot be made."""
    try:
        report = bench_dispatch.run(
            bench_dispatch.Workload(**workload),
            schemes=schemes or tuple(bench_dispatch.SCHEMES),
            repeats=repeats,
            inter_node_backend=inter_node_backend,
        )
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    except TestbedError as error:
        print(f"{error}\n`--hosts 0` runs without namespaces", file=sys.stderr)
        return 1
    table = Table("scheme", "wire MB", "ledger MB", "bytes", "ms", "p95", "time", "rel. L2")
    for name, row in report["schemes"].items():
        table.add_row(
            name,
            "-" if row["wire_bytes"] is None else f"{row['wire_bytes'] / 1e6:.2f}",
            f"{row['ledger_bytes'] / 1e6:.2f}",
            f"{row['bytes_ratio']:.3f}x" if "bytes_ratio" in row else "",
            f"{1000 * row['seconds_median']:.0f}",
            f"{1000 * row['seconds_p95']:.0f}",
            f"{row['seconds_ratio']:.2f}x" if "seconds_ratio" in row else "",
            f"{row['rel_l2']:.4f}",
        )
    Console().print(table)
    print("one layer; bytes of all hosts, time of the slowest rank; ratios are to flat_bf16")
    write_json(json_file, report)
    return 0
