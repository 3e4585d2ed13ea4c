"""`expertmesh simulate record` and `simulate twin`: a real run, and the simulation's of the same."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deploy.simulate.warnings_shown import shown_warnings

if TYPE_CHECKING:
    from rich.console import Console

    from simulations.hardware.calibration import Calibration
    from simulations.twin.check import Check
    from simulations.twin.noted import Arrival
    from simulations.twin.recording import Recording

LAYOUT = ("experts.num_redundant_experts=4", "experts.split=balanced", "scheduler.max_num_seqs=4")
"""Of a recording that nobody configures, besides the demo's options."""
ARRIVES_EVERY = 3  # iterations of the engines
LOOKS_BETWEEN = 4


def register(app: typer.Typer) -> None:
    """Add both commands."""
    app.command("record")(record)
    app.command("twin")(twin)


def record(
    out: Annotated[Path, typer.Option(metavar="FILE", help="The recording, a .npz.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Options that override the configuration."),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            "--config",
            metavar="FILE",
            help=f"YAML configuration. Default: the demo's with {' '.join(LAYOUT)}.",
        ),
    ] = None,
    requests: Annotated[int, typer.Option(min=1, help="They come one after the other.")] = 24,
    max_tokens: Annotated[int, typer.Option(min=1, help="Of each answer.")] = 24,
    looks_every: Annotated[int, typer.Option(min=1, help="Steps between looks at the load.")] = 8,
    rebalances: Annotated[int, typer.Option(min=0, help="Experts move so often.")] = 2,
) -> None:
    """Run a model on this machine's ranks and record it: routing, batches, placements, bytes.

    The file goes to `simulate twin FILE`, and to whatever takes recorded routing.
    """
    raise typer.Exit(
        record_command(
            out,
            config,
            overrides or [],
            requests=requests,
            max_tokens=max_tokens,
            looks_every=looks_every,
            rebalances=rebalances,
        )
    )


def record_command(
    out: Path,
    config_file: Path | None,
    overrides: list[str],
    *,
    requests: int,
    max_tokens: int,
    looks_every: int,
    rebalances: int,
) -> int:
    """Write the recording; 0, 1 if the run failed, 2 for bad input, 130 when interrupted."""
    from rich.console import Console

    from cluster.config import ConfigError
    from cluster.model.errors import CheckpointError, UnsupportedModelError
    from comms.launch import RankError
    from deploy.settings import load_config
    from simulations.twin.record import record
    from simulations.whole_file import write_whole

    console = Console(stderr=True)
    if not out.parent.is_dir():
        print(f"--out {out}: no such directory {out.parent}", file=sys.stderr)
        return 2
    try:
        wanted = overrides if config_file else [*LAYOUT, *overrides]
        settings = load_config(config_file, wanted)
        arrivals = arriving(Path(settings.model), requests, max_tokens)
        with console.status("the engine runs ..."):
            recording = record(
                settings,
                arrivals,
                looks_every=looks_every,
                after_looks=[LOOKS_BETWEEN * (i + 1) for i in range(rebalances)],
            )
    except (ConfigError, CheckpointError, UnsupportedModelError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    except RankError as error:
        print(f"the run failed: {str(error).splitlines()[0]}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; nothing is written", file=sys.stderr)
        return 130
    write_whole(out, recording.to_bytes())
    print(
        f"{out}: {recording.num_steps} steps, {len(recording.arrays['routing'])} tokens, "
        f"{sum(len(r.rows) for r in recording.rebalances)} layers changed in "
        f"{len(recording.rebalances)} rebalances, {out.stat().st_size / 1e3:.0f} kB"
    )
    return 0


def arriving(model: Path, requests: int, max_tokens: int) -> list[Arrival]:
    """Text of one domain after the other if the model has a tokenizer, else random tokens."""
    import numpy as np

    from cluster.engine.sampling_params import SamplingParams
    from cluster.model.config import ModelConfig
    from cluster.offline import add_frame
    from deploy.models.domain_prompts import DOMAIN_PROMPTS
    from simulations.twin.noted import Arrival

    texts = [text for of_domain in DOMAIN_PROMPTS.values() for text in of_domain]
    if (model / "tokenizer.json").is_file():
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
        prompts = [tokenizer.encode(text).ids for text in texts]
    else:
        rng, size = np.random.default_rng(0), ModelConfig.from_dir(model).vocab_size
        prompts = [rng.integers(size, size=16).tolist() for _ in texts]
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    return [
        Arrival(
            ARRIVES_EVERY * i,
            add_frame(f"request-{i}", prompts[i * len(prompts) // requests % len(prompts)], params),
        )
        for i in range(requests)
    ]


def twin(
    recording: Annotated[Path, typer.Argument(metavar="FILE", help="Of `simulate record`.")],
    calibration: Annotated[
        str | None,
        typer.Option(help="Predict times too: name or file. Default: this project's CPU's."),
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Also write the result as JSON.")
    ] = None,
) -> None:
    """Replay a recorded run with the router, scheduler and planner that serve, and compare all of it.

    Everything but the times must be the same, to the last byte; exit code 1 if it is not.
    """
    raise typer.Exit(twin_command(recording, calibration, json_file))


def twin_command(file: Path, calibration: str | None, json_file: Path | None) -> int:
    """Print the comparison; 0 if all is the same, 1 if not, 2 for a file that is no recording."""
    from rich.console import Console

    from deploy.json_file import write_json
    from router.load import LoadFileError
    from simulations.hardware.calibration import NAMES, Calibration
    from simulations.twin.recording import Recording
    from simulations.twin.replay import check

    measured_here = next((name for name in NAMES if name.startswith("cpu")), None)
    name = calibration or measured_here
    try:
        speeds = Calibration.load(name) if name else None
        recording = Recording.read(file)
        checks = check(recording)
    except (LoadFileError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    console = Console()
    show_checks(console, checks)
    result: dict[str, Any] = {
        "kind": "twin",
        "steps": recording.num_steps,
        "checks": [asdict(found) for found in checks],
        "same": not any(found.num_wrong for found in checks),
    }
    if speeds is not None and result["same"]:
        result["times"] = show_times(console, recording, speeds)
    write_json(json_file, result)
    return 0 if result["same"] else 1


def show_checks(console: Console, checks: list[Check]) -> None:
    """What was compared, and what differs."""
    from rich.table import Table

    table = Table("replayed and recorded", "compared", "different")
    for column in table.columns[1:]:
        column.justify = "right"
    for found in checks:
        table.add_row(found.name, f"{found.compared:,}", f"{found.num_wrong:,}")
    console.print(table)
    for found in checks:
        for line in found.wrong:
            console.print(f"{found.name}: {line}", highlight=False, markup=False, soft_wrap=True)
        if found.num_wrong > len(found.wrong):
            console.print(f"{found.name}: {found.num_wrong:,} in all")


def show_times(console: Console, recording: Recording, calibration: Calibration) -> dict[str, Any]:
    """Times side by side."""
    from rich.table import Table

    from simulations.twin.times import compare_times

    try:
        rows, warnings = compare_times(recording, calibration)
    except ValueError as error:
        console.print(f"times: not predicted, {error}", highlight=False)
        return {"calibration": calibration.name, "why_not": str(error)}
    table = Table("median of steps", "measured ms", f"predicted ms ({calibration.name})", "ratio")
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows:
        table.add_row(
            row.name,
            f"{1e3 * row.measured_s:.2f}",
            f"{1e3 * row.predicted_s:.2f}",
            f"{row.predicted_s / row.measured_s:.2f}" if row.measured_s else "",
        )
    console.print(table)
    for line in shown_warnings(warnings):
        console.print(line, highlight=False)
    return {
        "calibration": calibration.name,
        "hash": calibration.hash,
        "parts": [asdict(row) for row in rows],
        "warnings": warnings,
    }
