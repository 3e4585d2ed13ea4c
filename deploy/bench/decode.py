"""`expertmesh bench decode --device cuda`: run, show, write the JSON; transformers beside it if asked."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from cluster.model.cuda.transformer import Quantization
from deploy.bench.transformers_gpu import stock_speed
from deploy.json_file import write_json
from simulations import presets


def decode_command(
    preset: str,
    quantizations: Sequence[str],
    batches: Sequence[int],
    num_gpus: int,
    tensor_parallel: bool,
    with_transformers: bool,
    profile: Path | None,
    json_file: Path | None,
) -> int:
    """results.<bfloat16 | fp8>.{decode.<batch>,prefill}, see `bench_decode.run`; results.stock with
    transformers. With two GPUs experts are divided over them, with `tensor_parallel` heads too, and
    batches are of both together. 2 for a model that is no preset."""
    if preset not in presets.PRESETS:
        print(f"model {preset!r} is none of {', '.join(presets.PRESETS)}", file=sys.stderr)
        return 2
    from simulations.bench import bench_decode, decode_pair

    if profile is not None:
        profile.mkdir(parents=True, exist_ok=True)
    console = Console(stderr=True)
    names: list[Quantization] = [None if name == "bfloat16" else "fp8" for name in quantizations]
    if num_gpus == 2:
        each = batches if tensor_parallel else [max(1, batch // 2) for batch in batches]
        report = decode_pair.run_pair(
            preset, quantizations=names, batches=each, tensor_parallel=tensor_parallel
        )
    else:
        report = bench_decode.run(
            preset,
            quantizations=names,
            batches=batches,
            profile=profile,
            stock=(lambda: stock_speed(preset, batches)) if with_transformers else None,
            say=console.print,
        )
    Console().print(_table(report))
    print(
        f"{report['device']}, copies at {report['copy_bytes_per_s'] / 1e12:.2f} TB/s; served: with inputs "
        "from the host and the chosen tokens back"
    )
    write_json(json_file, report)
    return 0


def _table(report: dict[str, Any]) -> Table:
    table = Table("weights", "batch", "step ms", "tokens/s", "floor ms", "over floor", "served ms")
    for name, results in report["results"].items():
        for batch, row in results["decode"].items():
            cells = [f"{row['step_ms']:.2f}", f"{row['tokens_per_s']:,.0f}"]
            if "floor_ms" in row:
                cells += [f"{row['floor_ms']:.2f}", f"{row['over_floor']:.2f}x"]
                cells += [f"{row['served_ms']:.2f}"]
            table.add_row(name, batch, *cells)
        if row := results.get("prefill"):
            tokens = f"prefill {row['tokens']}"
            table.add_row(name, tokens, f"{row['ms']:.1f}", f"{row['tokens_per_s']:,.0f}")
    return table
