"""The `expertmesh` command. Each subcommand is one short function that imports what it needs."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from deploy.server_options import Server, with_server
from deploy.simulate.commands import simulate

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    help="Serve Mixture-of-Experts language models across machines with expert parallelism.",
)
bench = typer.Typer(no_args_is_help=True, help="Measure, side by side in one run.")
app.add_typer(bench, name="bench")
testbed = typer.Typer(
    no_args_is_help=True, help="Hosts with limited links on this machine; needs root and iproute2."
)
app.add_typer(testbed, name="testbed")
app.add_typer(simulate, name="simulate")

JsonFile = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", help="Also write the result as JSON.")
]
TraceFile = Annotated[
    Path | None,
    typer.Option("--trace", metavar="FILE", help="Write what every rank did, for Perfetto."),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Options that override the configuration."),
]


Preset = Annotated[
    str | None, typer.Option(metavar="NAME", help="A task of the server, such as math-tutor.")
]
System = Annotated[str | None, typer.Option(metavar="TEXT", help="System message of the chat.")]
Temperature = Annotated[
    float | None, typer.Option(help="0 is greedy. Default: 0, or what the preset has.")
]
TestbedName = Annotated[str, typer.Option("--name", help="Which testbed, if you have several.")]


@app.command()
def serve(
    overrides: Overrides = None,
    config: Annotated[
        Path | None,
        typer.Option("--config", metavar="FILE", help="YAML configuration. Default: the demo's."),
    ] = None,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print every option in force, and exit.")
    ] = False,
) -> None:
    """Serve a model over gRPC until Ctrl-C, e.g. `expertmesh serve model=DIR`.

    Uses the Ray cluster that RAY_ADDRESS names, or starts a private one on this machine.
    """
    from deploy.serve import serve_command

    raise typer.Exit(serve_command(config, overrides or [], print_only=print_config))


@app.command()
def doctor(
    overrides: Overrides = None,
    config: Annotated[
        Path | None,
        typer.Option("--config", metavar="FILE", help="YAML configuration. Default: the demo's."),
    ] = None,
    address: Annotated[
        str, typer.Option(metavar="RAY", help="Ray cluster to look at. Default: this host's.")
    ] = "auto",
    json_file: JsonFile = None,
) -> None:
    """Check a Ray cluster before deploying on it: would this start, and if not, what to do.

    Run it on the Ray head, or as a job there. Exits 1 when something is to be fixed first.
    """
    from deploy.doctor.command import doctor_command

    raise typer.Exit(doctor_command(config, overrides or [], address, json_file))


@app.command()
def credentials(
    directory: Annotated[Path, typer.Argument(help="Where to write them; made if need be.")],
    hosts: Annotated[
        str, typer.Option(help="Names and addresses of the server for clients, comma separated.")
    ] = "",
    days: Annotated[int, typer.Option(min=1, max=7300, help="That certificates are valid.")] = 825,
) -> None:
    """Make certificates and tokens for a server that other hosts may reach.

    Clients on this host may use localhost as well. Nothing is overwritten.
    """
    from deploy.credentials import credentials_command

    names = [host.strip() for host in hosts.split(",") if host.strip()]
    raise typer.Exit(credentials_command(directory, names, days))


@app.command()
@with_server
def health(
    server: Server,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds to wait for it.")] = 3.0,
) -> None:
    """Exit 0 when a server is ready for requests, else 1. Needs no token."""
    from deploy.health import health_command

    raise typer.Exit(health_command(server, timeout))


@app.command()
@with_server
def generate(
    prompt: Annotated[str, typer.Argument(help="Text to continue, or to answer.")],
    server: Server,
    chat: Annotated[bool, typer.Option("--chat", help="Send it as a message of a chat.")] = False,
    preset: Preset = None,
    system: System = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate at most.")] = 64,
    temperature: Temperature = None,
    top_p: Annotated[
        float | None, typer.Option(help="Keep the likeliest tokens of this mass. Default: all.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Same seed, same tokens.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text.")] = None,
) -> None:
    """Stream a completion, or the answer to a message, from a running cluster to the terminal."""
    from deploy.generate import generate_command

    raise typer.Exit(
        generate_command(
            prompt,
            server=server,
            chat=chat,
            preset=preset,
            system=system,
            max_tokens=max_tokens,
            temperature=0.0 if temperature is None and preset is None else temperature,
            top_p=top_p,
            seed=seed,
            stop=stop or None,
        )
    )


@app.command()
@with_server
def chat(
    server: Server,
    preset: Preset = None,
    system: System = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens of an answer. Default: the server's.")
    ] = None,
    temperature: Temperature = None,
    seed: Annotated[int | None, typer.Option(help="Same seed, same tokens.")] = None,
) -> None:
    """Talk with the model of a running cluster. Ctrl-C ends an answer, Ctrl-D the chat."""
    from deploy.chat import chat_command

    raise typer.Exit(
        chat_command(
            server=server,
            preset=preset,
            system=system,
            max_tokens=max_tokens,
            temperature=0.0 if temperature is None and preset is None else temperature,
            seed=seed,
        )
    )


@app.command()
@with_server
def top(
    server: Server,
    interval: Annotated[float, typer.Option(min=0.1, max=3600, help="Seconds.")] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Print one frame and exit.")] = False,
) -> None:
    """Watch a running cluster: load of ranks by layer, links, rebalances, requests.

    Fits the terminal. Where output is no terminal it prints one frame, of COLUMNS x LINES.
    """
    from deploy.top import top_command

    raise typer.Exit(top_command(server, interval, once=once))


@app.command()
@with_server
def placement(
    server: Server,
    layer: Annotated[
        int | None, typer.Option(min=0, help="Only this layer of the model, in full.")
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Show which rank of a running cluster holds which experts."""
    from deploy.placement import placement_command

    raise typer.Exit(placement_command(server, layer, json_file))


@app.command()
@with_server
def rebalance(
    server: Server,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only show what it would bring.")
    ] = False,
    target: Annotated[
        float | None, typer.Option(help="Imbalance to reach. Default: the server's.")
    ] = None,
    from_scratch: Annotated[
        bool, typer.Option("--from-scratch", help="Plan without regard to what is where.")
    ] = False,
    json_file: JsonFile = None,
) -> None:
    """Move experts of a running cluster so that its ranks have equal load, and watch it happen.

    Requests go on meanwhile. Ctrl-C ends the watching, not the moving.
    """
    from deploy.rebalance import rebalance_command

    raise typer.Exit(
        rebalance_command(
            server,
            dry_run=dry_run,
            target=target,
            from_scratch=from_scratch,
            json_file=json_file,
        )
    )


@app.command()
@with_server
def trace(
    server: Server,
    steps: Annotated[int, typer.Option(min=1, max=1000, help="Steps to record.")] = 20,
    timeout: Annotated[
        float, typer.Option(min=0.1, max=600, help="Seconds to wait for so many steps.")
    ] = 30.0,
    out: Annotated[Path, typer.Option(metavar="FILE", help="Where to write it.")] = Path(
        "trace.json"
    ),
) -> None:
    """Record what every rank does in its next steps, for https://ui.perfetto.dev.

    A cluster makes steps only while it has requests. It records nothing before and after.
    """
    from deploy.trace import trace_command

    raise typer.Exit(trace_command(server, steps, timeout, out))


@app.command()
def calibrate(
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    model: Annotated[
        str | None,
        typer.Option(help="Whose sizes: a preset, or a config.json. Default: by device."),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Few sizes, to try it.")] = False,
    out: Annotated[Path, typer.Option(metavar="FILE", help="Where to write it.")] = Path(
        "calibration.json"
    ),
) -> None:
    """Measure this machine, so that `simulate` can predict clusters of it."""
    from deploy.calibrate import calibrate_command

    raise typer.Exit(calibrate_command(device, model, quick=quick, out=out))


@app.command()
def demo(json_file: JsonFile = None) -> None:
    """Start 2 logical nodes x 2 ranks here, stream three completions, show the traffic, stop."""
    from deploy.demo import demo_command

    raise typer.Exit(demo_command(json_file))


@app.command()
def verify(
    directory: Annotated[Path, typer.Argument(help="Hugging Face checkpoint directory.")],
    layouts: Annotated[str, typer.Option(help="Nodes x ranks, comma separated.")] = "1x1,2x2",
    tokens: Annotated[int, typer.Option(min=1, help="Greedy tokens to compare.")] = 64,
    json_file: JsonFile = None,
) -> None:
    """Compare a checkpoint on this engine with transformers, in fp32, on each layout.

    Exits 1 when logits differ by more than 1e-4 or a greedy token differs.
    """
    from deploy.verify import verify_command

    raise typer.Exit(verify_command(directory, layouts, tokens, json_file))


@bench.command("collectives")
def bench_collectives(
    ranks: Annotated[int, typer.Option(min=2, max=16, help="Ranks on this machine.")] = 4,
    json_file: JsonFile = None,
) -> None:
    """Shared-memory collectives against gloo, medians in microseconds."""
    from deploy.bench import collectives_command

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
    from deploy.bench_codecs import codecs_command

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
    from deploy.bench_balance import balance_command

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
    from deploy.bench import step_command

    raise typer.Exit(step_command(config, overrides or [], sequences, steps, json_file, trace_file))


@bench.command("dispatch")
def bench_dispatch(
    hosts: Annotated[
        int, typer.Option(help="Hosts as namespaces; 0: two nodes on loopback, without root.")
    ] = 4,
    ranks_per_host: Annotated[int, typer.Option(help="Ranks of each host.")] = 2,
    rate: Annotated[str, typer.Option(help='Of each link, each way, or "none".')] = "200mbit",
    hidden: Annotated[int, typer.Option(help="Channels of a token.")] = 2048,
    experts: Annotated[int, typer.Option(help="Experts in all.")] = 256,
    topk: Annotated[int, typer.Option(help="Experts of each token.")] = 8,
    groups: Annotated[int, typer.Option(help="Groups of experts.")] = 8,
    topk_groups: Annotated[int, typer.Option(help="Groups that a token may choose from.")] = 4,
    tokens: Annotated[int, typer.Option(help="Tokens of each rank.")] = 512,
    repeats: Annotated[int, typer.Option(help="Timed layers of each scheme.")] = 5,
    schemes: Annotated[str, typer.Option(help="Which, comma separated. Default: all.")] = "",
    inter_node_backend: Annotated[str, typer.Option(help="tcp or gloo.")] = "tcp",
    trace_file: TraceFile = None,
    json_file: JsonFile = None,
) -> None:
    """Bytes between hosts, seconds and error of one MoE layer's exchange, by scheme."""
    # Hosts of a testbed have no names; the store would warn of it once per rank.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from deploy.bench_dispatch import dispatch_command

    raise typer.Exit(
        dispatch_command(
            {
                "hosts": hosts,
                "ranks_per_host": ranks_per_host,
                "rate": None if rate == "none" else rate,
                "hidden": hidden,
                "experts": experts,
                "topk": topk,
                "groups": groups,
                "topk_groups": topk_groups,
                "tokens": tokens,
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
    from deploy.bench_dispatch import latency_command

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
    from deploy.bench_dispatch import overlap_command

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
    from deploy.bench import migration_command

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
    from deploy.bench_rebalance import Load, rebalance_command

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
    from deploy.bench_serve import serve_command
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
    from deploy.storm.command import storm_command

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
    from deploy.bench_overload import OverloadBench, overload_command
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
    from deploy.bench import scheduler_command

    raise typer.Exit(scheduler_command(sequences or [64, 256, 1024], steps, json_file))


@bench.command("simulator")
def bench_simulator(json_file: JsonFile = None) -> None:
    """Simulated steps a second: 64 ranks on one core, 9,936 ranks on two; and peak memory."""
    from deploy.bench_simulator import simulator_command

    raise typer.Exit(simulator_command(json_file))


@testbed.command("up")
def up_testbed(
    hosts: Annotated[int, typer.Option(help="How many hosts.")] = 2,
    rate: Annotated[
        str, typer.Option(help='Of each link, each way: "200mbit", "10gbit" ..., or "none".')
    ] = "200mbit",
    name: TestbedName = "by-hand",
) -> None:
    """Make hosts as network namespaces, joined by links of this rate, until `testbed down`."""
    from deploy.testbed import up_command

    raise typer.Exit(up_command(hosts, rate, name))


@testbed.command("exec")
def exec_in_testbed(
    host: Annotated[int, typer.Argument(help="Which host, from 0.")],
    command: Annotated[list[str], typer.Argument(help="What to run there, after `--`.")],
    name: TestbedName = "by-hand",
) -> None:
    """Run a command in a host, e.g. `expertmesh testbed exec 0 -- ip addr`."""
    from deploy.testbed import exec_command

    raise typer.Exit(exec_command(host, command, name))


@testbed.command("status")
def show_testbeds() -> None:
    """Show every testbed of this machine: hosts, addresses, bytes, processes."""
    from deploy.testbed import status_command

    raise typer.Exit(status_command())


@testbed.command("down")
def down_testbed(name: TestbedName = "by-hand") -> None:
    """Remove a testbed and everything inside, and what crashed runs left."""
    from deploy.testbed import down_command

    raise typer.Exit(down_command(name))


def main() -> None:
    """Entry point of the `expertmesh` command; Ctrl-C ends it with exit code 130."""
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(130)
