"""`expertmesh simulate ...`: what a cluster would do, computed by the code that serves."""

import typer

from deploy.simulate import balance, claims, report, scoreboard, serve, sweep, twin

simulate = typer.Typer(
    no_args_is_help=True,
    help="Try clusters before buying them: balance, serving, published figures.",
)

for command in (balance, serve, sweep, claims, scoreboard, twin, report):
    command.register(simulate)
