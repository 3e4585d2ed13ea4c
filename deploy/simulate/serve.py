"""`expertmesh simulate serve`: requests on a cluster that does not exist yet."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deploy.simulate.options import (
    CLUSTER,
    RESULT,
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

_TRAFFIC, _SERVER = "Traffic", "Server"


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("serve")(serve)


def serve(
    preset: Preset = "deepseek-v3",
    nodes: Nodes = 8,
    ranks_per_node: RanksPerNode = 8,
    tp: TpSize = 1,
    redundant_experts: RedundantExperts = None,
    weights: Weights = "float8",
    kv_dtype: Annotated[
        str, typer.Option(help="bfloat16 or float8.", rich_help_panel=CLUSTER)
    ] = "bfloat16",
    dispatcher: Dispatcher = "hierarchical",
    overlap: Overlap = "none",
    calibration: CalibrationName = "h100-published",
    arrivals: Annotated[
        str,
        typer.Option(
            help="poisson, bursts, or closed: users who wait for their answers.",
            rich_help_panel=_TRAFFIC,
        ),
    ] = "poisson",
    rate: Annotated[
        float, typer.Option(help="Requests per second.", rich_help_panel=_TRAFFIC)
    ] = 20.0,
    concurrency: Annotated[
        int, typer.Option(help="Users of --arrivals closed.", rich_help_panel=_TRAFFIC)
    ] = 256,
    requests: Annotated[
        int | None,
        typer.Option(help="So many; if not given, 2000.", rich_help_panel=_TRAFFIC),
    ] = None,
    duration: Annotated[
        float | None,
        typer.Option(help="Instead: seconds in which they come.", rich_help_panel=_TRAFFIC),
    ] = None,
    prompt: Annotated[
        str,
        typer.Option(help="Mean tokens, and lognormal spread.", rich_help_panel=_TRAFFIC),
    ] = "1000:0.5",
    output: Annotated[
        str,
        typer.Option(help="Mean tokens, and lognormal spread.", rich_help_panel=_TRAFFIC),
    ] = "200:0.5",
    trace: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Recorded arrivals and lengths instead: JSON lines or CSV with arrival_s, "
            "prompt_tokens, output_tokens, or the columns of Azure's and Mooncake's traces.",
            rich_help_panel=_TRAFFIC,
        ),
    ] = None,
    workload: Annotated[
        str,
        typer.Option(
            help="Which experts tokens choose: lognormal, zipf, burst, two_topic, uniform, drift, "
            "task_shift or node_skew.",
            rich_help_panel=_TRAFFIC,
        ),
    ] = "lognormal",
    skew: Skew = None,
    jitter: Annotated[
        float, typer.Option(help="Log-sd from step to step.", rich_help_panel=_TRAFFIC)
    ] = 0.1,
    shift_every: Annotated[
        int, typer.Option(help="Steps of a subject (burst, task_shift).", rich_help_panel=_TRAFFIC)
    ] = 500,
    policy: Annotated[
        str, typer.Option(help="ours, eplb or none.", rich_help_panel=_SERVER)
    ] = "ours",
    cold_start: Annotated[
        bool,
        typer.Option(
            "--cold-start",
            help="Experts start as loaded, not where the policy would have put them.",
            rich_help_panel=_SERVER,
        ),
    ] = False,
    max_num_seqs: Annotated[
        int, typer.Option(help="Running sequences of a replica.", rich_help_panel=_SERVER)
    ] = 128,
    max_num_batched_tokens: Annotated[
        int, typer.Option(help="Tokens of a replica's step.", rich_help_panel=_SERVER)
    ] = 512,
    block_size: Annotated[
        int, typer.Option(help="Tokens of a block of KV cache.", rich_help_panel=_SERVER)
    ] = 64,
    max_model_len: Annotated[
        int | None,
        typer.Option(
            help="Prompt and completion; if not given, the model's.", rich_help_panel=_SERVER
        ),
    ] = None,
    max_num_queued_reqs: Annotated[
        int,
        typer.Option(
            help="Waiting and running together; more are refused.", rich_help_panel=_SERVER
        ),
    ] = 65_536,
    fail: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TIME:RANK[:RECOVERY_S]",
            help="A rank is lost at that second. May be given again.",
            rich_help_panel=_SERVER,
        ),
    ] = None,
    pareto: Annotated[
        str | None,
        typer.Option(
            metavar="USERS,USERS...",
            help="Also: throughput against speed for so many users, e.g. 64,512,4096.",
            rich_help_panel=RESULT,
        ),
    ] = None,
    seed: Seed = 0,
    json_file: JsonFile = None,
    report: ReportDirectory = None,
) -> None:
    """Serve requests on a simulated cluster: times to tokens, throughput, memory, failures.

    The gateway's admission, the schedulers, KV blocks, placements and rebalances are the code that
    serves; only the time of a step is computed.
    """
    from deploy.simulate.outputs import Outputs
    from deploy.simulate.serve_command import Options, serve_command

    options = Options(
        preset=preset,
        nodes=nodes,
        ranks_per_node=ranks_per_node,
        tp=tp,
        redundant_experts=redundant_experts,
        weights=weights,
        kv_dtype=kv_dtype,
        dispatcher=dispatcher,
        overlap=overlap,
        calibration=calibration,
        arrivals=arrivals,
        rate=rate,
        concurrency=concurrency,
        requests=requests,
        duration=duration,
        prompt=prompt,
        output=output,
        trace=trace,
        workload=workload,
        skew=skew,
        jitter=jitter,
        shift_every=shift_every,
        policy=policy,
        cold_start=cold_start,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        block_size=block_size,
        max_model_len=max_model_len,
        max_num_queued_reqs=max_num_queued_reqs,
        fail=tuple(fail or ()),
        pareto=pareto,
        seed=seed,
    )
    raise typer.Exit(serve_command(options, Outputs(json_file, report)))
