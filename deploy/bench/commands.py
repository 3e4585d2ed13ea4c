"""`expertmesh bench ...`: what is measured here, each against something in the same run."""

import typer

from deploy.bench import gpu_commands, network_commands, part_commands, serving_commands

bench = typer.Typer(no_args_is_help=True, help="Measure, side by side in one run.")
for command in (
    part_commands.collectives,
    part_commands.codecs,
    part_commands.balance,
    part_commands.step,
    gpu_commands.experts,
    gpu_commands.decode,
    network_commands.dispatch,
    network_commands.latency,
    network_commands.overlap,
    part_commands.migration,
    serving_commands.rebalance,
    serving_commands.serve,
    serving_commands.storm,
    serving_commands.overload,
    part_commands.scheduler,
    part_commands.simulator,
):
    bench.command()(command)
