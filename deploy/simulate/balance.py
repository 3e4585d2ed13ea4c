"""`expertmesh simulate balance`: how even ranks are, and what that is worth, policy by policy."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deploy.simulate.options import (
    CLUSTER,
    LOAD,
    CalibrationName,
    Dispatcher,
    JsonFile,
    Nodes,
    Overlap,
    Preset,
    RanksPerNode,
    RedundantExperts,
    ReportDirectory,
    Seed,
    Skew,
    TpSize,
    Weights,
)

_POLICY = "Policies"


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("balance")(balance)


def balance(
    preset: Preset = "deepseek-v3",
    nodes: Nodes = 8,
    ranks_per_node: RanksPerNode = 8,
    tp: TpSize = 1,
    redundant_experts: RedundantExperts = None,
    units: Annotated[
        int,
        typer.Option(
            help="So many of these clusters side by side, each with a load of its own.",
            rich_help_panel=CLUSTER,
        ),
    ] = 1,
    weights: Weights = "float8",
    dispatcher: Dispatcher = "hierarchical",
    overlap: Overlap = "none",
    calibration: CalibrationName = "h100-published",
    tokens_per_rank: Annotated[int, typer.Option(help="Of a step.", rich_help_panel=LOAD)] = 128,
    context: Annotated[
        int,
        typer.Option(help="Keys of each sequence; with prefill, prompt.", rich_help_panel=LOAD),
    ] = 4096,
    phase: Annotated[str, typer.Option(help="decode or prefill.", rich_help_panel=LOAD)] = "decode",
    workload: Annotated[
        str | None,
        typer.Option(
            help="lognormal, zipf, burst, two_topic, uniform, drift, task_shift or node_skew; of "
            "recorded routing mixed, task_shift or node_skew. Default: lognormal, or mixed.",
            rich_help_panel=LOAD,
        ),
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Recorded routing or a load window (.npz), or counts dumped by SGLang or vLLM "
            "(.pt, .json).",
            rich_help_panel=LOAD,
        ),
    ] = None,
    skew: Skew = None,
    jitter: Annotated[
        float | None,
        typer.Option(
            help="Log-sd of experts' loads from step to step. Default: 0.1; 0 of a trace.",
            rich_help_panel=LOAD,
        ),
    ] = None,
    rho: Annotated[
        float,
        typer.Option(help="drift: correlation over 100 steps.", rich_help_panel=LOAD),
    ] = 0.99,
    shift_every: Annotated[
        int,
        typer.Option(help="Steps between bursts, or tasks.", rich_help_panel=LOAD),
    ] = 500,
    policies: Annotated[
        str, typer.Option(help="Which, of all five.", rich_help_panel=_POLICY)
    ] = "none,eplb,eplb_relabel,static,ours",
    steps: Annotated[int, typer.Option(rich_help_panel=LOAD)] = 2000,
    interval: Annotated[
        int,
        typer.Option(help="Steps between looks of our policy.", rich_help_panel=_POLICY),
    ] = 50,
    window: Annotated[
        int, typer.Option(help="Steps that our policy remembers.", rich_help_panel=_POLICY)
    ] = 1000,
    eplb_interval: Annotated[
        int, typer.Option(help="Steps between plans of EPLB.", rich_help_panel=_POLICY)
    ] = 1000,
    bandwidth: Annotated[
        float,
        typer.Option(
            help="GB/s of experts that a rank of ours may receive while it serves.",
            rich_help_panel=_POLICY,
        ),
    ] = 1.0,
    resplit_us: Annotated[
        float,
        typer.Option(
            help="What counting and dividing a batch adds to a layer of ours, in microseconds.",
            rich_help_panel=_POLICY,
        ),
    ] = 0.0,
    seed: Seed = 0,
    jobs: Annotated[
        int | None,
        typer.Option(help="Processes for several units. Default: a core each."),
    ] = None,
    json_file: JsonFile = None,
    report: ReportDirectory = None,
) -> None:
    """Serve one workload under several policies of expert placement, side by side.

    none: experts in order. eplb: EPLB over all ranks. eplb_relabel: its ranks renamed so that fewer
    experts move. static: our placements. ours: and every batch divided by its own counts.

    Ctrl-C keeps what is done.
    """
    from deploy.simulate.balance_command import Options, balance_command
    from deploy.simulate.outputs import Outputs

    options = Options(
        preset=preset,
        nodes=nodes,
        ranks_per_node=ranks_per_node,
        tp=tp,
        redundant_experts=redundant_experts,
        units=units,
        weights=weights,
        dispatcher=dispatcher,
        overlap=overlap,
        calibration=calibration,
        tokens_per_rank=tokens_per_rank,
        context=context,
        phase=phase,
        workload=workload,
        trace=trace,
        skew=skew,
        jitter=jitter,
        rho=rho,
        shift_every=shift_every,
        policies=policies,
        steps=steps,
        interval=interval,
        window=window,
        eplb_interval=eplb_interval,
        bandwidth=bandwidth,
        resplit_us=resplit_us,
        seed=seed,
        jobs=jobs,
    )
    raise typer.Exit(balance_command(options, Outputs(json_file, report)))
