"""`expertmesh bench ...` of the exchange between ranks: dispatch, its latency, and what is hidden of it."""

import os
from typing import Annotated, Any

import typer

from deploy.bench.gpu_commands import need_gpus
from deploy.options import JsonFile, TraceFile

Device = Annotated[str, typer.Option(help="cpu, or cuda: on this machine's GPUs.")]


def dispatch(
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
    rail: Annotated[
        bool, typer.Option(help="cuda: also as if each GPU were a node, over NCCL.")
    ] = False,
    trace_file: TraceFile = None,
    json_file: JsonFile = None,
) -> None:
    """Bytes between hosts, seconds and error of one MoE layer's exchange, by scheme; on GPUs of one
    host (--device cuda), microseconds of dispatch and combine over symmetric memory."""
    if device == "cuda":
        need_gpus(2, device)
        from deploy.bench.dispatch_gpu import dispatch_gpu_command

        workload: dict[str, Any] = {
            "hidden": hidden or 7168,
            "num_experts": experts,
            "num_topk": topk,
            "tokens": tuple(tokens or (128, 1024, 4096)),
            "rail": rail,
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


def latency(
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


def overlap(
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
