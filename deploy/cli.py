"""The `expertmesh` command. Each subcommand is one short function that imports what it needs."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from deploy.bench.commands import bench
from deploy.options import JsonFile, Overrides
from deploy.server_options import Server, with_server
from deploy.simulate.commands import simulate

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    help="Serve Mixture-of-Experts language models across machines with expert parallelism.",
)
app.add_typer(bench, name="bench")
testbed = typer.Typer(
    no_args_is_help=True, help="Hosts with limited links on this machine; needs root and iproute2."
)
app.add_typer(testbed, name="testbed")
app.add_typer(simulate, name="simulate")


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
    from deploy.top.command import top_command

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
        typer.Option(
            help="Whose sizes: presets (comma separated) or a config.json. Default: by device."
        ),
    ] = None,
    kernels: Annotated[str, typer.Option(help="On a GPU: ours, or PyTorch's (library).")] = "ours",
    quick: Annotated[bool, typer.Option("--quick", help="Few sizes, to try it.")] = False,
    out: Annotated[Path, typer.Option(metavar="FILE", help="Where to write it.")] = Path(
        "calibration.json"
    ),
) -> None:
    """Measure this machine, so that `simulate` can predict clusters of it."""
    from deploy.calibrate import calibrate_command

    raise typer.Exit(calibrate_command(device, model, quick=quick, out=out, kernels=kernels))


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


if __name__ == "__main__":  # without an installation: python3 -m deploy.cli
    main()
