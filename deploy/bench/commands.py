"""`expertmesh bench ...`: what is measured here, each against something in the same run."""

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from deploy.options import JsonFile, Overrides

bench = typer.Typer(no_args_is_help=True, help="Measure, side by side in one run.")

TraceFile = Annotated[
    Path | None,
    typer.Option("--trace", metavar="FILE", help="Write what every rank did, for Perfetto."),
]


@bench.command("collectives")
def bench_collectives(
    ranks: Annotated[int, typer.Option(min=2, max=16, help="Ranks on this machine.")] = 4,
    json_file: JsonFile = None,
) -> None:
    """Shared-memory collectives against gloo, medians in microseconds."""
    from deploy.bench.engine import collectives_command

    raise typer.Exit(collectives_command(ranks, json_file))


@bench.command("codecs")
def bench_codecs(
    model: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Checkpoint to take rows from. Default: mosaic."),
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Bytes, error and speed of the codecs; partial sums in bfloat16 and on an integer grid."""
    from deploy.bench.codecs import codecs_command

    raise typer.Exit(codecs_command(model, json_file))


@bench.command("balance")
def bench_balance(
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


@bench.command("step")
def bench_step(
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


Device = Annotated[str, typer.Option(help="cpu, or cuda: on this machine's GPUs.")]
Gpu = Annotated[str, typer.Option(help="cuda; there is no CPU side to this one.")]


@bench.command("experts")
def bench_experts(
    device: Gpu = "cuda",
    layer: Annotated[
        bool, typer.Option(help="The whole MoE layer as one of 64 cards sees it, part by part.")
    ] = False,
    hidden: Annotated[int, typer.Option(help="Channels of a token.")] = 7168,
    intermediate: Annotated[int, typer.Option(help="Channels inside an expert.")] = 2048,
    dtype: Annotated[
        list[str] | None, typer.Option(help="float8 or bfloat16; repeat for both. [both]")
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Grouped products of experts on a GPU: ours, the library's, and the hardware's floor."""
    dtypes = _all_of(dtype, ("float8", "bfloat16"), "--dtype")
    _need_gpus(1, device)
    if layer:
        from deploy.bench.moe_layer_gpu import layer_command

        raise typer.Exit(layer_command(device, hidden, intermediate, dtypes, json_file))
    from deploy.bench.experts import experts_command

    raise typer.Exit(experts_command(device, hidden, intermediate, dtypes, json_file))


@bench.command("decode")
def bench_decode(
    device: Gpu = "cuda",
    model: Annotated[str, typer.Option(help="A preset; weights are random.")] = "deepseek-v2-lite",
    quantization: Annotated[
        list[str] | None, typer.Option(help="bfloat16 or fp8; repeat for both. [both]")
    ] = None,
    batch: Annotated[
        list[int] | None, typer.Option(help="Sequences decoding at once; repeat. [1 16 128 512]")
    ] = None,
    gpus: Annotated[int, typer.Option(help="1, or 2 with the experts divided over them.")] = 1,
    transformers: Annotated[
        bool, typer.Option("--transformers", help="Also measure transformers on this GPU.")
    ] = False,
    profile: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write what each kernel takes there.")
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Tokens per second of a whole model on a GPU, beside the memory's floor and transformers."""
    quantizations = _all_of(quantization, ("bfloat16", "fp8"), "--quantization")
    _need_gpus(gpus, device)
    from deploy.bench.decode import decode_command

    raise typer.Exit(
        decode_command(
            model,
            quantizations,
            batch or [1, 16, 128, 512],
            gpus,
            transformers,
            profile,
            json_file,
        )
    )


@bench.command("dispatch")
def bench_dispatch(
    device: Device = "cpu",
    hosts: Annotated[
        int, typer.Option(help="Hosts as namespaces; 0: two nodes on loopback, without root.")
    ] = 4,
    ranks_per_host: Annotated[int, typer.Option(help="Ranks of each host.")] = 2,
    rate: Annotated[str, typer.Option(help='Of each link, each way, or "none".')] = "200mbit",
    hidden: Annotated[
        int | None, typer.Option(help="Channels of a token. [2048; cuda: 7168]")
    ] = None,
    experts: Annotated[int, typer.Option(help="Experts in all.")] = 256,
    topk: Annotated[int, typer.Option(help="Experts of each token.")] = 8,
    groups: Annotated[int, typer.Option(help="Groups of experts.")] = 8,
    topk_groups: Annotated[int, typer.Option(help="Groups that a token may choose from.")] = 4,
    tokens: Annotated[
        list[int] | None,
        typer.Option(help="Of each rank; cuda: repeat for several. [512; cuda: 128 1024 4096]"),
    ] = None,
    repeats: Annotated[int, typer.Option(help="Timed layers of each scheme.")] = 5,
    schemes: Annotated[str, typer.Option(help="Which, comma separated. Default: all.")] = "",
    inter_node_backend: Annotated[str, typer.Option(help="tcp or gloo.")] = "tcp",
    trace_file: TraceFile = None,
    json_file: JsonFile = None,
) -> None:
    """Bytes between hosts, seconds and error of one MoE layer's exchange, by scheme; on GPUs of one
    host (--device cuda), microseconds of dispatch and combine over symmetric memory."""
    if device == "cuda":
        _need_gpus(2, device)
        from deploy.bench.dispatch_gpu import dispatch_gpu_command

        workload: dict[str, Any] = {
            "hidden": hidden or 7168,
            "num_experts": experts,
            "num_topk": topk,
            "tokens": tuple(tokens or (128, 1024, 4096)),
        }
        raise typer.Exit(dispatch_gpu_command(workload, json_file))
    if device != "cpu" or len(tokens or ()) > 1:
        wrong = f"--device {device!r} is none of cpu, cuda" if device != "cpu" else "one --tokens"
        raise typer.BadParameter(wrong)
    # Hosts of a testbed have no names; the store would warn of it once per rank.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from deploy.bench.dispatch import dispatch_command

    raise typer.Exit(
        dispatch_command(
            {
                "hosts": hosts,
                "ranks_per_host": ranks_per_host,
                "rate": None if rate == "none" else rate,
                "hidden": hidden or 2048,
                "experts": experts,
                "topk": topk,
                "groups": groups,
                "topk_groups": topk_groups,
                "tokens": (tokens or [512])[0],
            },
            [name for name in schemes.split(",") if name],
            repeats,
            inter_node_backend,
            json_file,
            trace_file,
        )
    )


@bench.command("latency")
def bench_latency(
    hosts: Annotated[
        int, typer.Option(help="Hosts as namespaces; 0: two nodes on loopback, without root.")
    ] = 2,
    ranks_per_host: Annotated[int, typer.Option(help="Ranks of each host.")] = 2,
    rate: Annotated[str, typer.Option(help='Of each link, each way, or "none".')] = "none",
    hidden: Annotated[int, typer.Option(help="Channels of a token.")] = 2048,
    rounds: Annotated[int, typer.Option(help="Rounds of 20 layers, of all transports.")] = 3,
    json_file: JsonFile = None,
) -> None:
    """Microseconds per dispatch and combine of 1 to 32 tokens, by dispatcher and transport."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # as above
    from deploy.bench.dispatch import latency_command

    workload = {
        "hosts": hosts,
        "ranks_per_host": ranks_per_host,
        "rate": None if rate == "none" else rate,
        "hidden": hidden,
    }
    raise typer.Exit(latency_command(workload, rounds, json_file))


@bench.command("overlap")
def bench_overlap(
    hosts: Annotated[
        int, typer.Option(help="Hosts as namespaces; 0: two nodes on loopback, without root.")
    ] = 2,
    rate: Annotated[str, typer.Option(help='Of each link, each way, or "none".')] = "200mbit",
    repeats: Annotated[int, typer.Option(help="Runs of each case.")] = 3,
    json_file: JsonFile = None,
) -> None:
    """How much of the communication is hidden under computation, by size, and at what cost."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # as above
    from deploy.bench.dispatch import overlap_command

    limit = None if rate == "none" else rate
    raise typer.Exit(overlap_command(hosts, limit, repeats, json_file))


@bench.command("migration")
def bench_migration(
    overrides: Overrides = None,
    blocks: Annotated[int, typer.Option(min=1, help="Of 100 quiet and 100 busy steps.")] = 5,
    changes: Annotated[int, typer.Option(min=1, help="Layers changed in each busy block.")] = 4,
    json_file: JsonFile = None,
) -> None:
    """What moving experts costs the steps meanwhile: quiet and busy blocks of steps in turns."""
    from deploy.bench.engine import migration_command

    raise typer.Exit(migration_command(overrides or [], blocks, changes, json_file))


@bench.command("rebalance")
def bench_rebalance(
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


@bench.command("serve")
def bench_serve(
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


@bench.command("storm")
def bench_storm(
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


@bench.command("overload")
def bench_overload(
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


@bench.command("scheduler")
def bench_scheduler(
    sequences: Annotated[
        list[int] | None, typer.Option(min=1, help="Running at once. Default: 64, 256 and 1024.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Measured steps of each size.")] = 300,
    json_file: JsonFile = None,
) -> None:
    """What planning a step costs a leader: scheduler, prefix cache, plans; without a model."""
    from deploy.bench.engine import scheduler_command

    raise typer.Exit(scheduler_command(sequences or [64, 256, 1024], steps, json_file))


@bench.command("simulator")
def bench_simulator(json_file: JsonFile = None) -> None:
    """Simulated steps a second: 64 ranks on one core, 9,936 ranks on two; and peak memory."""
    from deploy.bench.simulator import simulator_command

    raise typer.Exit(simulator_command(json_file))


def _all_of(chosen: list[str] | None, known: tuple[str, ...], option: str) -> list[str]:
    """What was chosen, all there is by default; a usage error for anything else."""
    for name in chosen or ():
        if name not in known:
            raise typer.BadParameter(f"{option} {name!r} is none of {', '.join(known)}")
    return chosen or list(known)


def _need_gpus(number: int, device: str) -> None:
    """A usage error for another device than CUDA's; exit code 2 without so many GPUs."""
    if device != "cuda":
        raise typer.BadParameter(f"--device {device!r}: this one runs on cuda only")
    import torch

    found = torch.cuda.device_count()
    if found < number:
        print(f"this needs {number} CUDA GPU{'s'[: number > 1]}: {found} visible", file=sys.stderr)
        raise typer.Exit(2)
