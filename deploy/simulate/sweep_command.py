"""What `expertmesh simulate sweep` does: read the grid, evaluate it, show the best."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from cluster.model.errors import CheckpointError, UnsupportedModelError
from deploy.leaving import Leaving
from deploy.simulate.outputs import Outputs
from deploy.simulate.sweep_table import show
from simulations.balance.load_shares import Workload
from simulations.deployment import ComputeDtype
from simulations.hardware.calibration import Calibration
from simulations.presets import load_model
from simulations.processes import available_cores
from simulations.sweep.point import Study, evaluate
from simulations.sweep.point_store import PointStore
from simulations.sweep.sweep import Grid, Swept, best_points, sweep

UNSAVED = Path("sweep-points.jsonl")
"""Where an interrupted sweep without --points leaves what it has."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """As on the command line: lists are text such as 4,8."""

    preset: str
    nodes: str
    ranks_per_node: str
    redundant_experts: str
    tokens_per_rank: str
    context: str
    overlap: str
    policies: str
    workload: str
    skew: float | None
    jitter: float
    steps: int
    seed: int
    weights: str
    calibration: str
    tpot_ms: float
    jobs: int | None


def sweep_command(options: Options, points_file: Path | None, outputs: Outputs) -> int:
    """0; 2 for what cannot be; 1 if a process dies; 130 on Ctrl-C, with what was done written."""
    try:
        grid, study, jobs = _read(options)
        outputs.check()
        store = PointStore(points_file)
        with Leaving().handled():
            swept = _evaluated(grid, study, store, jobs)
        refused = _all_impossible(swept)
    except (ValueError, CheckpointError, UnsupportedModelError) as error:
        refused = str(error)
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    if refused:
        print(refused, file=sys.stderr)
        return 2
    result = _result(options, grid, study, swept)
    show(Console(), result)
    outputs.write(result)
    return _say_how_to_go_on(swept, store) if swept.interrupted else 0


def _read(options: Options) -> tuple[Grid, Study, int]:
    """Raises ValueError naming the option, and what files raise."""
    grid = Grid(
        num_nodes=_numbers("--nodes", options.nodes),
        ranks_per_node=_numbers("--ranks-per-node", options.ranks_per_node),
        num_redundant_experts=_numbers("--redundant-experts", options.redundant_experts),
        tokens_per_rank=_numbers("--tokens-per-rank", options.tokens_per_rank),
        context=_numbers("--context", options.context),
        overlap=_words(options.overlap),
        policy=_words(options.policies),
    )
    jobs = available_cores() if options.jobs is None else options.jobs
    if jobs < 1 or not options.tpot_ms > 0:
        raise ValueError(
            f"--jobs must be at least 1 and --tpot-ms positive, got {jobs} and {options.tpot_ms:g}"
        )
    load_model(options.preset)
    study = Study(
        preset=options.preset,
        calibration=Calibration.load(options.calibration),
        workload=Workload(name=options.workload, skew=options.skew, jitter=options.jitter),
        weights=cast(ComputeDtype, options.weights),
        steps=options.steps,
        seed=options.seed,
    )
    return grid, study, jobs


def _numbers(option: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"{option} must be whole numbers such as 4,8, got {text!r}") from None


def _words(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(","))


def _evaluated(grid: Grid, study: Study, store: PointStore, jobs: int) -> Swept:
    points = list(grid.points())
    with _progress(len(points)) as finished:
        return sweep(
            points,
            partial(evaluate, study),
            store=store,
            about=study.about(),
            num_processes=jobs,
            finished=finished,
        )


@contextmanager
def _progress(total: int) -> Iterator[Any]:
    """A bar on stderr, if somebody looks at it."""
    console = Console(stderr=True)
    columns = (TextColumn("points"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task("", total=total)
        yield lambda count: bar.update(task, completed=count)


def _all_impossible(swept: Swept) -> str:
    """Why, if no point of the grid can be at all."""
    results = list(swept.results.values())
    if results and all(result["status"] == "impossible" for result in results):
        return str(results[0]["why"])
    return ""


def _result(options: Options, grid: Grid, study: Study, swept: Swept) -> dict[str, Any]:
    model = load_model(options.preset)
    result: dict[str, Any] = {
        "kind": "sweep",
        "version": version("expertmesh"),
        "seed": options.seed,
        "command": _command(options),
        "calibration": {"name": study.calibration.name, "hash": study.calibration.hash},
        "model": {
            "name": options.preset,
            "num_experts": model.num_experts,
            "num_moe_layers": model.num_moe_layers,
            "top_k": model.gate.num_experts_per_token,
        },
        "workload": asdict(study.workload),
        "steps": options.steps,
        "tpot_ms": options.tpot_ms,
        "grid": {axis: list(values) for axis, values in asdict(grid).items()},
        "warnings": _warnings(swept),
        "best": best_points(list(swept.results.values()), options.tpot_ms),
        "points": [
            {"point": asdict(point), "result": found} for point, found in swept.results.items()
        ],
    }
    if swept.interrupted:
        result["interrupted"] = True
    return result


def _warnings(swept: Swept) -> list[str]:
    """Of all points, each once."""
    found = [result.get("warnings", "") for result in swept.results.values()]
    return list(dict.fromkeys(part for text in found for part in text.split("; ") if part))


def _command(options: Options) -> list[str]:
    """What gives the same result; how many processes does not matter to it."""
    values = {name: value for name, value in asdict(options).items() if name != "jobs"}
    given = [
        part
        for name, value in values.items()
        if value is not None
        for part in (f"--{name.replace('_', '-')}", f"{value}")
    ]
    return ["expertmesh", "simulate", "sweep", *given]


def _say_how_to_go_on(swept: Swept, store: PointStore) -> int:
    if store.path is None:
        store.save(UNSAVED)
    print(
        f"stopped after {len(swept.results)} of {swept.num_points} points; to go on: the same "
        f"command with --points {store.path or UNSAVED}",
        file=sys.stderr,
    )
    return 130
