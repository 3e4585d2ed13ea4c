"""`expertmesh simulate sweep`: which cluster, before buying one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deploy.simulate.options import (
    LOAD,
    RESULT,
    CalibrationName,
    JsonFile,
    Preset,
    ReportDirectory,
    Seed,
    Skew,
    Weights,
)

_GRID = "Grid (several values: 4,8)"


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("sweep")(sweep)


def sweep(
    preset: Preset = "deepseek-v3",
    nodes: Annotated[str, typer.Option(rich_help_panel=_GRID)] = "4,8",
    ranks_per_node: Annotated[str, typer.Option(rich_help_panel=_GRID)] = "8",
    redundant_experts: Annotated[
        str, typer.Option(help="Further copies of experts.", rich_help_panel=_GRID)
    ] = "0,32,64",
    tokens_per_rank: Annotated[
        str, typer.Option(help="Sequences that a rank decodes.", rich_help_panel=_GRID)
    ] = "32,64,128,256",
    context: Annotated[
        str, typer.Option(help="Tokens that each attends to.", rich_help_panel=_GRID)
    ] = "4096",
    overlap: Annotated[str, typer.Option(help="none, two_batch.", rich_help_panel=_GRID)] = "none",
    policies: Annotated[
        str,
        typer.Option(help="none, eplb, eplb_relabel, static, ours.", rich_help_panel=_GRID),
    ] = "none,eplb,ours",
    workload: Annotated[
        str,
        typer.Option(
            help="Which experts tokens choose: lognormal, zipf, burst, two_topic, uniform, drift, "
            "task_shift or node_skew.",
            rich_help_panel=LOAD,
        ),
    ] = "lognormal",
    skew: Skew = None,
    jitter: Annotated[
        float, typer.Option(help="Log-sd from step to step.", rich_help_panel=LOAD)
    ] = 0.1,
    steps: Annotated[int, typer.Option(help="Of each point.", rich_help_panel=LOAD)] = 200,
    seed: Seed = 0,
    weights: Weights = "float8",
    calibration: CalibrationName = "h100-published",
    tpot_ms: Annotated[
        float,
        typer.Option(
            help="Also the best point within this time per token.", rich_help_panel=RESULT
        ),
    ] = 50.0,
    jobs: Annotated[
        int | None, typer.Option(help="Processes. Default: a core each.", rich_help_panel=RESULT)
    ] = None,
    points: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Keep finished points here as they come; a later sweep goes on from them.",
            rich_help_panel=RESULT,
        ),
    ] = None,
    json_file: JsonFile = None,
    report: ReportDirectory = None,
) -> None:
    """Evaluate every combination of cluster, batch and policy; which one serves most.

    Points that do not fit into memory say by how much. Ctrl-C keeps what is done.
    """
    from deploy.simulate.outputs import Outputs
    from deploy.simulate.sweep_command import Options, sweep_command

    options = Options(
        preset=preset,
        nodes=nodes,
        ranks_per_node=ranks_per_node,
        redundant_experts=redundant_experts,
        tokens_per_rank=tokens_per_rank,
        context=context,
        overlap=overlap,
        policies=policies,
        workload=workload,
        skew=skew,
        jitter=jitter,
        steps=steps,
        seed=seed,
        weights=weights,
        calibration=calibration,
        tpot_ms=tpot_ms,
        jobs=jobs,
    )
    raise typer.Exit(sweep_command(options, points, Outputs(json_file, report)))
