"""What `expertmesh simulate balance` does with its options, and what it prints."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from comms.topology import Topology
from deploy.simulate.asked_to_stop import asked_to_stop
from deploy.simulate.outputs import INTERRUPTED, Outputs, command
from deploy.simulate.warnings_shown import shown_warnings
from simulations.balance.load_balance import (
    BalanceSpec,
    Trace,
    make_loads,
    simulate,
    spare_slot_each,
)
from simulations.balance.load_shares import Workload
from simulations.deployment import Deployment
from simulations.hardware.calibration import Calibration
from simulations.presets import load_model, shown_name
from simulations.processes import available_cores


@dataclass(frozen=True, kw_only=True)
class Options:
    """As given; see the command's help."""

    preset: str
    nodes: int
    ranks_per_node: int
    tp: int
    redundant_experts: int | None
    units: int
    weights: str
    dispatcher: str
    overlap: str
    calibration: str
    tokens_per_rank: int
    context: int
    phase: str
    workload: str | None
    trace: Path | None
    skew: float | None
    jitter: float | None
    rho: float
    shift_every: int
    policies: str
    steps: int
    interval: int
    window: int
    eplb_interval: int
    bandwidth: float
    resplit_us: float
    seed: int
    jobs: int | None


def balance_command(options: Options, outputs: Outputs) -> int:
    """Simulate, print a table, write what was asked for; the exit code."""
    torch.set_num_threads(1)  # nothing here is worth a second one
    try:
        spec = balance_spec(options)
        if options.jobs is not None and options.jobs < 1:
            raise ValueError(f"--jobs must be at least 1, got {options.jobs}")
        make_loads(spec, 0)  # refuses a trace before anything has begun
        outputs.check()
        stopping = asked_to_stop() if spec.units == 1 else nullcontext(lambda: False)
        with stopping as stop, _progress() as progress:
            result = simulate(
                spec,
                command=tuple(command()),
                num_processes=options.jobs or available_cores(),
                stop=stop,
                progress=progress,
            )
        _show(result)
        outputs.write(result)
    except KeyboardInterrupt:
        print("stopped before anything was done", file=sys.stderr)
        return INTERRUPTED
    except (ValueError, OSError, RuntimeError) as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return 2
    return INTERRUPTED if "interrupted" in result else 0


def balance_spec(options: Options) -> BalanceSpec:
    """Checked; ValueError for what cannot be."""
    model = load_model(options.preset)
    topology = Topology(
        num_nodes=options.nodes,
        ranks_per_node=options.ranks_per_node,
        tensor_parallel_size=options.tp,
    )
    redundant = options.redundant_experts
    kinds: dict[str, Any] = {
        name: getattr(options, name) for name in ("weights", "dispatcher", "overlap")
    }
    same: dict[str, Any] = {
        name: getattr(options, name)
        for name in (
            "steps",
            "tokens_per_rank",
            "context",
            "phase",
            "interval",
            "window",
            "eplb_interval",
            "units",
            "seed",
        )
    }
    return BalanceSpec(
        model_name=shown_name(options.preset),
        deployment=Deployment(
            model=model,
            topology=topology,
            num_redundant_experts=(
                spare_slot_each(model, topology) if redundant is None else redundant
            ),
            **kinds,
        ),
        calibration=Calibration.load(options.calibration),
        load=_load(options),
        policies=tuple(name.strip() for name in options.policies.split(",")),
        bandwidth=options.bandwidth * 1e9,
        resplit_s=options.resplit_us * 1e-6,
        **same,
    )


def _load(options: Options) -> Workload | Trace:
    if options.trace is None:
        return Workload(
            name=options.workload or "lognormal",
            skew=options.skew,
            jitter=0.1 if options.jitter is None else options.jitter,
            rho=options.rho,
            shift_every=options.shift_every,
        )
    if options.skew is not None:
        raise ValueError("--skew is of drawn workloads: a trace has its own")
    order: Any = options.workload or "mixed"
    return Trace(
        path=options.trace,
        order=order,
        shift_every=options.shift_every,
        jitter=options.jitter or 0.0,
    )


@contextmanager
def _progress() -> Iterator[Callable[[float], None]]:
    """A bar on stderr, if that is a terminal."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda part: None
        return
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("steps", total=1.0)
        yield lambda part: progress.update(task, completed=part)


# The table --------------------------------------------------------------------------------------


def _show(result: dict[str, Any]) -> None:
    model, cluster = result["model"], result["cluster"]
    units = f"{cluster['units']} x " if cluster["units"] > 1 else ""
    _say(
        f"{model['name']} on {units}{cluster['num_nodes']} nodes x {cluster['ranks_per_node']} ranks, "
        f"{cluster['slots_per_rank']} slots each; workload {result['workload']['name']}, "
        f"{result['steps']:,} steps of {result['tokens_per_rank']} tokens a rank; calibration "
        f"{result['calibration']['name']} {result['calibration']['hash']}; "
        f"{result['steps_per_s']:,.0f} steps/s"
    )
    best = max(row["throughput"] for row in result["policies"].values())
    table = Table(box=None, padding=(0, 1, 0, 0))
    for number, name in enumerate(
        ("policy", "max/mean", "p99", "planned", "KiB*", "moved", "ms/step", "tokens/s", "")
    ):
        table.add_column(name, justify="right" if number else "left", no_wrap=True)
    for name, row in result["policies"].items():
        table.add_row(
            name,
            f"{row['imbalance_mean']:.3f}",
            f"{row['imbalance_p99']:.3f}",
            f"{row['planned_imbalance']:.3f}",
            f"{row['node_bytes_per_token'] / 1024:.1f}",
            _bytes(row["migrated_bytes"]),
            f"{row['step_ms_mean']:.2f}",
            f"{row['throughput']:,.0f}",
            "best" if row["throughput"] == best else f"{row['throughput'] / best - 1:.1%}",
        )
    Console(width=80, highlight=False).print(table)
    _say(
        "* between nodes, per token and layer. tokens/s counts what moving experts costs; dividing a "
        "batch is free unless --resplit-us says otherwise"
    )
    for line in shown_warnings(result["warnings"]):
        _say(line)
    if "interrupted" in result:
        _say("interrupted: these are the steps that were done")


def _say(text: str) -> None:
    print(fill(text, 80, subsequent_indent="  "))


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
