"""`expertmesh simulate claims`: what is said of expert parallelism, and what comes out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deploy.simulate.options import CalibrationName, JsonFile, ReportDirectory, Seed


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("claims")(claims)


def claims(
    trace: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Recorded routing of DeepSeek-V2-Lite (.npz); rows that need it are skipped "
            "without.",
        ),
    ] = None,
    only: Annotated[
        str, typer.Option(help="Which, of all four.")
    ] = "traffic,difference,throughput,tensor_parallel",
    steps: Annotated[int, typer.Option(help="Of each run.")] = 500,
    seed: Seed = 0,
    calibration: CalibrationName = "h100-published",
    json_file: JsonFile = None,
    report: ReportDirectory = None,
) -> None:
    """Examine published claims: each with its baseline, what was measured, and a verdict.

    60 % fewer bytes between nodes; loads of ranks within 10 %; 30 % more throughput by balancing;
    3.2 times the throughput and half the latency of tensor parallelism.
    """
    from deploy.simulate.claims_command import claims_command
    from deploy.simulate.outputs import Outputs

    raise typer.Exit(
        claims_command(
            trace=trace,
            only=only,
            steps=steps,
            seed=seed,
            calibration=calibration,
            outputs=Outputs(json_file, report),
        )
    )
