"""`expertmesh bench dispatch`, `bench latency` and `bench overlap`: run, show, write the JSON."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from comms.trace_file import TraceError, check_path
from deploy.json_file import write_json
from simulations.bench import bench_dispatch, bench_latency, bench_overlap
from simulations.bench.moe_layer import Workload
from simulations.testbed import TestbedError


def dispatch_command(
    workload: dict[str, Any],
    schemes: Sequence[str],
    repeats: int,
    inter_node_backend: str,
    json_file: Path | None,
    trace_file: Path | None,
) -> int:
    """schemes.<name>.{wire_bytes,ledger_bytes,seconds_median,seconds_p95,rel_l2}; 2 for options
    that cannot be, 1 where hosts cannot be made."""
    try:
        if trace_file is not None:
            check_path(trace_file)
        report = bench_dispatch.run(
            Workload(**workload),
            schemes=schemes or tuple(bench_dispatch.SCHEMES),
            repeats=repeats,
            inter_node_backend=inter_node_backend,
            trace_file=trace_file,
        )
    except (ValueError, TraceError, TestbedError) as error:
        return _refused(error)
    table = Table(
        "scheme",
        "wire MB",
        "ledger MB",
        "bytes",
        "ms",
        "p95",
        "time",
        "rel. L2",
        padding=(0, 1, 0, 0),
    )
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
    if trace_file is not None:
        print(f"wrote {trace_file}: open it in https://ui.perfetto.dev or chrome://tracing")
    write_json(json_file, report)
    return 0


def latency_command(workload: dict[str, Any], rounds: int, json_file: Path | None) -> int:
    """results[].us.<tokens>: microseconds of a layer's dispatch and combine; exit codes as above."""
    try:
        report = bench_latency.run(Workload(**workload), rounds=rounds)
    except (ValueError, TestbedError) as error:
        return _refused(error)
    sizes = list(report["results"][0]["us"])
    table = Table("dispatcher", "inside", "between", *sizes, padding=(0, 1, 0, 0))
    for row in report["results"]:
        figures = [f"{row['us'][size]:.0f}" for size in sizes]
        table.add_row(row["dispatcher"], row["inside"], row["between"], *figures)
    Console().print(table)
    print(
        "microseconds per dispatch and combine, by tokens of each rank; the slowest rank's median"
    )
    write_json(json_file, report)
    return 0


def overlap_command(hosts: int, rate: str | None, repeats: int, json_file: Path | None) -> int:
    """cases[].{compute_s,comm_s,serial_s,overlapped_s,hidden_fraction}; exit codes as above."""
    try:
        model = bench_overlap.Model(hosts=hosts, rate=rate)
        report = bench_overlap.run(model, repeats=repeats)
    except (ValueError, TestbedError) as error:
        return _refused(error)
    columns = ("tokens", "chosen", "compute", "comm", "serial", "overlapped", "hidden")
    table = Table(*columns, padding=(0, 1, 0, 0))
    for case in report["cases"]:
        times = (case[f"{name}_s"] for name in ("compute", "comm", "serial", "overlapped"))
        table.add_row(
            str(case["tokens"]),
            f"{case['micro_batches']} x {case['parts']}",
            *(f"{1000 * seconds:.0f}" for seconds in times),
            f"{case['hidden_fraction']:.0%}" if case["overlaps"] else "-",
        )
    Console().print(table)
    print("chosen: micro-batches x parts; milliseconds; hidden of the shorter of compute and comm")
    write_json(json_file, report)
    return 0


def _refused(error: Exception) -> int:
    print(error, file=sys.stderr)
    if isinstance(error, TestbedError):
        print("`--hosts 0` runs without namespaces", file=sys.stderr)
        return 1
    return 2
