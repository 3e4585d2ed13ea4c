"""`expertmesh bench ...` of single parts of the engine, on this machine's processors."""

from pathlib import Path
from typing import Annotated

import typer

from deploy.options import JsonFile, Overrides, TraceFile


def collectives(
    ranks: Annotated[int, typer.Option(min=2, max=16, help="Ranks on this machine.")] = 4,
    json_file: JsonFile = None,
) -> None:
    """Shared-memory collectives against gloo, medians in microseconds."""
    from deploy.bench.engine import collectives_command

    raise typer.Exit(collectives_command(ranks, json_file))


def codecs(
    model: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Checkpoint to take rows from. Default: mosaic."),
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Bytes, error and speed of the codecs; partial sums in bfloat16 and on an integer grid."""
    from deploy.bench.codecs import codecs_command

    raise typer.Exit(codecs_command(model, json_file))


def balance(
    section: Annotated[
        list[str] | None,
        typer.Option(help="planned, served, real, drift or sends; repeat for several. [all]"),
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option(metavar="NPZ", help="Recorded routing: expert ids [tokens, layers, k]."),
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """How even experts' loads become, and what moves for it, beside EPLB's plans."""
    from deploy.bench.balance import balance_command

    raise typer.Exit(balance_command(section or [], trace, json_file))


def step(
    overrides: Overrides = None,
    config: Annotated[Path | None, typer.Option("--config", metavar="FILE")] = None,
    sequences: Annotated[int, typer.Option(min=1, help="Sequences decoding at once.")] = 8,
    steps: Annotated[int, typer.Option(min=1, help="Decode steps to measure.")] = 50,
    trace_file: TraceFile = None,
    json_file: JsonFile = None,
) -> None:
    """Where a decode step's time goes on this machine, milliseconds per phase."""
    from deploy.bench.engine import step_command

    raise typer.Exit(step_command(config, overrides or [], sequences, steps, json_file, trace_file))


def migration(
    overrides: Overrides = None,
    blocks: Annotated[int, typer.Option(min=1, help="Of 100 quiet and 100 busy steps.")] = 5,
    changes: Annotated[int, typer.Option(min=1, help="Layers changed in each busy block.")] = 4,
    json_file: JsonFile = None,
) -> None:
    """What moving experts costs the steps meanwhile: quiet and busy blocks of steps in turns."""
    from deploy.bench.engine import migration_command

    raise typer.Exit(migration_command(overrides or [], blocks, changes, json_file))


def scheduler(
    sequences: Annotated[
        list[int] | None, typer.Option(min=1, help="Running at once. Default: 64, 256 and 1024.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Measured steps of each size.")] = 300,
    json_file: JsonFile = None,
) -> None:
    """What planning a step costs a leader: scheduler, prefix cache, plans; without a model."""
    from deploy.bench.engine import scheduler_command

    raise typer.Exit(scheduler_command(sequences or [64, 256, 1024], steps, json_file))


def simulator(json_file: JsonFile = None) -> None:
    """Simulated steps a second: 64 ranks on one core, 9,936 ranks on two; and peak memory."""
    from deploy.bench.simulator import simulator_command

    raise typer.Exit(simulator_command(json_file))
