"""`expertmesh bench experts`: grouped products of the experts on a GPU, beside floor and library."""

import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from deploy.json_file import write_json
from simulations.bench import bench_experts


def experts_command(
    hidden: int,
    intermediate: int,
    dtypes: list[str],
    json_file: Path | None,
) -> int:
    """points[].{floor_us,ours_us,library_us,relative_l2,...}; 1 without a GPU or Triton."""
    try:
        report = bench_experts.run(hidden=hidden, intermediate=intermediate, dtypes=dtypes)
    except (RuntimeError, ImportError) as error:
        print(error, file=sys.stderr)
        return 1
    console = Console()
    columns = (
        "dtype",
        "experts",
        "rows",
        "floor us",
        "ours us",
        "ratio",
        "torch us",
        "speedup",
        "rel. L2",
    )
    table = Table(*columns, title=report["device"], padding=(0, 1, 0, 0))
    for point in report["points"]:
        table.add_row(
            point["dtype"],
            str(point["experts"]),
            str(point["rows"]),
            f"{point['floor_us']:.0f}",
            f"{point['ours_us']:.0f}",
            f"{point['ours_over_floor']:.2f}",
            f"{point['library_us']:.0f}",
            f"{point['speedup']:.2f}",
            f"{point['relative_l2']:.4f}",
        )
    console.print(table)
    print("both products; ours with gathering and SwiGLU, torch's without (see the JSON for with)")
    write_json(json_file, report)
    return 0
