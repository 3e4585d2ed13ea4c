"""`expertmesh bench simulator`: how fast clusters are simulated."""

from pathlib import Path

from rich.console import Console
from rich.table import Table

from deploy.json_file import write_json
from simulations.bench import bench_simulator


def simulator_command(json_file: Path | None) -> int:
    """Steps a second; results.<size>.{steps_per_s,steps_per_s_with_counts,peak_bytes}."""
    report = bench_simulator.run()
    table = Table("ranks", "layers", "cores", "steps/s", "drawing counts too", "peak memory")
    for row in report["results"].values():
        table.add_row(
            f"{row['ranks']:,}",
            str(row["layers"]),
            str(row["cores"]),
            f"{row['steps_per_s']:,.0f}",
            f"{row['steps_per_s_with_counts']:,.0f}",
            f"{row['peak_bytes'] / 1e9:.2f} GB",
        )
    Console().print(table)
    write_json(json_file, report)
    return 0
