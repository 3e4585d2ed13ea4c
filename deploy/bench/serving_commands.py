"""`expertmesh bench ...` of a whole cluster that serves requests."""

from pathlib import Path
from typing import Annotated

import typer

from deploy.options import JsonFile, Overrides


def rebalance(
    overrides: Overrides = None,
    requests: Annotated[int, typer.Option(min=1, help="Requests of each domain.")] = 64,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests at once.")] = 16,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each answer.")] = 48,
    picture: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Draw balancedness over time (.png, .svg)."),
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Traffic that changes its subject, on a real cluster, with and without moving experts.

    Exits 1 when a request was lost or a token differs.
    """
    from deploy.bench.rebalance import Load, rebalance_command

    load = Load(requests=requests, concurrency=concurrency, max_tokens=max_tokens)
    raise typer.Exit(rebalance_command(overrides or [], load, picture, json_file))


def serve(
    overrides: Overrides = None,
    config: Annotated[Path | None, typer.Option("--config", metavar="FILE")] = None,
    endpoint: Annotated[
        str | None, typer.Option(help="A server that runs. Default: a cluster of our own.")
    ] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Users of a closed loop.")] = 64,
    rate: Annotated[
        float | None, typer.Option(help="Instead: requests a second of an open loop.")
    ] = None,
    burstiness: Annotated[float, typer.Option(help="Of an open loop; 1 is Poisson.")] = 1.0,
    requests: Annotated[
        int | None, typer.Option(min=1, help="Of each round. Default: 3 for each user.")
    ] = None,
    prompt: Annotated[str, typer.Option(help="Tokens: MEAN or MEAN:SPREAD (lognormal).")] = "32",
    output: Annotated[str, typer.Option(help="Tokens of answers, likewise.")] = "64",
    prefixes: Annotated[int, typer.Option(min=0, help="Beginnings that prompts share.")] = 0,
    prefix_tokens: Annotated[int, typer.Option(min=0, help="Tokens of each of them.")] = 0,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Same seed, same requests.")] = 0,
    slo_ttft_ms: Annotated[float | None, typer.Option(help="First token within.")] = None,
    slo_tpot_ms: Annotated[float | None, typer.Option(help="Each further one within.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Figures are medians of these.")] = 3,
    compare: Annotated[
        bool, typer.Option(help="Also one request at a time, and transformers.")
    ] = True,
    json_file: JsonFile = None,
) -> None:
    """What clients get over gRPC: tokens a second, TTFT, TPOT, ITL, goodput.

    In the same run, in turns: one request at a time, and transformers on the same processors.
    """
    from deploy.bench.serve import serve_command
    from simulations.bench.serving_outcomes import Slo

    raise typer.Exit(
        serve_command(
            {
                "concurrency": concurrency,
                "rate": rate,
                "burstiness": burstiness,
                "requests": requests,
                "prompt": prompt,
                "output": output,
                "num_prefixes": prefixes,
                "prefix_tokens": prefix_tokens,
                "temperature": temperature,
                "seed": seed,
            },
            Slo(slo_ttft_ms, slo_tpot_ms),
            json_file,
            rounds=rounds,
            compare=compare,
            endpoint=endpoint,
            overrides=overrides or [],
            config=config,
        )
    )


def storm(
    overrides: Overrides = None,
    config: Annotated[Path | None, typer.Option("--config", metavar="FILE")] = None,
    requests: Annotated[int, typer.Option(min=1, help="Requests, of all kinds.")] = 2000,
    concurrency: Annotated[int, typer.Option(min=1, help="Clients at once.")] = 32,
    seed: Annotated[int, typer.Option(help="Of all that is random.")] = 0,
    minutes: Annotated[float, typer.Option(min=0.1, help="No request begins later.")] = 24 * 60,
    json_file: JsonFile = None,
) -> None:
    """Random cancellations, disconnects and malformed requests against a real cluster here.

    Exits 1 when it fails one for reasons of its own, keeps memory, or changes others' tokens.
    """
    from deploy.bench.storm.command import storm_command

    raise typer.Exit(
        storm_command(config, overrides or [], requests, concurrency, seed, 60 * minutes, json_file)
    )


def overload(
    overrides: Overrides = None,
    config: Annotated[Path | None, typer.Option("--config", metavar="FILE")] = None,
    minutes: Annotated[float, typer.Option(min=0.05, help="Of overload.")] = 3.0,
    factor: Annotated[float, typer.Option(min=1, help="Of what the cluster can serve.")] = 10.0,
    users: Annotated[int, typer.Option(min=1, help="Requests that may run at once.")] = 64,
    slo_ttft_ms: Annotated[
        float | None, typer.Option(help="First token within. Default: 1.5 x the peak's p99.")
    ] = None,
    slo_tpot_ms: Annotated[
        float | None, typer.Option(help="Each further one within. Default: likewise.")
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Ten times more requests than a cluster can serve: what gets through, and what is left behind.

    Exits 1 when a request was lost, tokens differ from a quiet run's, or blocks were left in use.
    """
    from deploy.bench.overload import OverloadBench, overload_command
    from simulations.bench.serving_outcomes import Slo

    given = slo_ttft_ms is not None or slo_tpot_ms is not None
    bench = OverloadBench(
        minutes=minutes,
        factor=factor,
        users=users,
        slo=Slo(slo_ttft_ms, slo_tpot_ms) if given else None,
        overrides=overrides or [],
        config=config,
    )
    raise typer.Exit(overload_command(bench, json_file))
