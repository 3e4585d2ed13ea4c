"""`expertmesh bench dispatch --device cuda`: exchange between the GPUs of this host, beside its floor."""

import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from comms.launch import RankError
from deploy.json_file import write_json
from simulations.bench import bench_dispatch_gpu
from simulations.bench.exchange_times import LINK_BYTES_PER_S
from simulations.bench.exchange_workload import GpuWorkload


def dispatch_gpu_command(workload: dict[str, Any], json_file: Path | None) -> int:
    """results.<way>.<tokens>.{us,us_p90,floor_us,bytes,deepep_us}; 2 for options that cannot be, 1
    without the GPUs, without Triton, or where a bit differs from the reference."""
    try:
        chosen = GpuWorkload(**workload)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    try:
        report = bench_dispatch_gpu.run(chosen)
    except (ValueError, ImportError, RankError) as error:
        print(error, file=sys.stderr)
        return 1
    columns = ("way", "tokens", "us", "p90", "floor us", "ratio", "GB/s", "DeepEP us")
    table = Table(*columns, title=report["device"], padding=(0, 1, 0, 0))
    for name, sizes in report["results"].items():
        for tokens, figures in sizes.items():
            table.add_row(
                name,
                tokens,
                f"{figures['us']:.1f}",
                f"{figures['us_p90']:.1f}",
                f"{figures['floor_us']:.1f}",
                f"{figures['us'] / figures['floor_us']:.2f}" if figures["floor_us"] else "-",
                f"{figures['bytes'] / figures['us'] / 1e3:.0f}",
                f"{figures['deepep_us']:.0f}" if "deepep_us" in figures else "-",
            )
    Console().print(table)
    checks = report["checks"]
    print(
        f"microseconds of one call among many, on the slower rank; {checks['tokens']} tokens bitwise "
        f"equal to the reference, {checks['equal_repeats']} repeats equal; floor: the link's "
        f"{LINK_BYTES_PER_S / 1e9:.0f} GB/s; DeepEP V1.2.1: measured on two H200"
    )
    write_json(json_file, report)
    return 0
