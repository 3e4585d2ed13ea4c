"""`expertmesh simulate ...`: what a cluster would do, computed by the code that serves."""

from importlib import import_module
from importlib.util import find_spec

import typer

COMMANDS = ("balance", "serve", "sweep", "scoreboard", "claims", "report", "twin")

simulate = typer.Typer(
    no_args_is_help=True,
    help="Try clusters before buying them: balance, serving, published figures.",
)


for _name in COMMANDS:
    if find_spec(f"deploy.simulate_{_name}"):
        import_module(f"deploy.simulate_{_name}").register(simulate)
