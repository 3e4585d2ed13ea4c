"""`expertmesh bench ...`: run a measurement, show a table, write the JSON."""

import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from cluster.config import ConfigError
from comms.trace_file import TraceError, check_path
from deploy.json_file import write_json
from deploy.settings import read_config
from simulations.bench import bench_collectives, bench_migration, bench_scheduler, bench_step


def collectives_command(num_ranks: int, json_file: Path | None) -> int:
    """Every transport; results.<collective>.<bytes>.{shm_us,tcp_us,gloo_us}."""
    report = bench_collectives.run(num_ranks)
    table = Table("collective", "bytes", "shm us", "tcp us", "gloo us", "gloo / shm", "gloo / tcp")
    for collective, sizes in report["results"].items():
        for num_bytes, row in sizes.items():
            table.add_row(
                collective,
                num_bytes,
                f"{row['shm_us']:.0f}",
                f"{row['tcp_us']:.0f}",
                f"{row['gloo_us']:.0f}",
                f"{row['gloo_us'] / row['shm_us']:.1f}x",
                f"{row['gloo_us'] / row['tcp_us']:.1f}x",
            )
    Console().print(table)
    write_json(json_file, report)
    return 0


def step_command(
    path: Path | None,
    overrides: Sequence[str],
    sequences: int,
    steps: int,
    json_file: Path | None,
    trace_file: Path | None,
) -> int:
    """Milliseconds per phase of a decode step; results.<phase>.ms and .share."""
    try:
        config = read_config(path, overrides)
        if trace_file is not None:
            check_path(trace_file)
    except (ConfigError, TraceError) as error:
        print(error, file=sys.stderr)
        return 2
    report = bench_step.run(config, sequences, steps, trace_file)
    table = Table("phase", "ms", "share")
    for phase, row in report["results"].items():
        table.add_row(phase, f"{row['ms']:.2f}", f"{row['share']:.0%}")
    Console().print(table)
    print(
        f"{report['step_ms']:.1f} ms a step, {report['tokens_per_s']:.0f} tokens/s; "
        f"{report['overhead_share']:.1%} of it outside the model"
    )
    if trace_file is not None:
        print(f"wrote {trace_file}: open it in https://ui.perfetto.dev or chrome://tracing")
    write_json(json_file, report)
    return 0


def scheduler_command(sequences: Sequence[int], steps: int, json_file: Path | None) -> int:
    """Milliseconds of processor time; results.<sequences>.<part>.{p50_ms,p99_ms}."""
    report = bench_scheduler.run(tuple(sequences), steps)
    results = report["results"]
    table = Table("ms: median / p99", *(f"{size} sequences" for size in results))
    for part in ("schedule", "encode", "update", "sum", "batch", "decode", "pack"):
        of_sizes = [results[size][part] for size in results]
        cells = [f"{row['p50_ms']:.2f} / {row['p99_ms']:.2f}" for row in of_sizes]
        table.add_row(f"[bold]{part}" if part == "sum" else part, *cells)
    Console().print(table)
    print("sum: schedule, encode and update. batch: the plan's tensors. decode: on followers.")
    print(
        "pack: the events. Processor time, so other processes count as far as they thrash caches."
    )
    write_json(json_file, report)
    return 0


def migration_command(
    overrides: Sequence[str], blocks: int, changes_per_block: int, json_file: Path | None
) -> int:
    """Milliseconds of quiet and busy steps; results.{quiet,busy,under way}.{p50_ms,p99_ms,...}."""
    redundant = "experts.num_redundant_experts=8"
    try:
        config = read_config(None, [redundant, *overrides])
        report = bench_migration.run(config, blocks, changes_per_block)
    except (ConfigError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    table = Table("steps", "number", "p50 ms", "p90 ms", "p99 ms", "max ms")
    for name in ("quiet", "busy", "under way"):
        row = report[name]
        cells = [f"{row[key]:.1f}" for key in list(row)[1:]]
        table.add_row(name, f"{row['steps']:,}", *cells)
    Console().print(table)
    print(
        f"{report['experts']} experts, {report['bytes'] / 2**20:.1f} MiB, in "
        f"{report['layers_changed']} changes; longest stall {report['longest_stall_ms']:.3f} ms"
    )
    write_json(json_file, report)
    return 0
