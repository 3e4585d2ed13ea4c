"""`expertmesh simulate scoreboard`: predictions beside what others have published."""

from __future__ import annotations

import typer

from deploy.simulate.options import JsonFile, ReportDirectory


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("scoreboard")(scoreboard)


def scoreboard(
    json_file: JsonFile = None,
    report: ReportDirectory = None,
) -> None:
    """Predict published deployments of DeepSeek-V3 and print every error.

    Blind targets are those that no constant of the cost model has seen. docs/scoreboard.md says how
    it is done, and how to submit a target.
    """
    from deploy.simulate.outputs import Outputs
    from simulations.scoreboard.board import run, table

    outputs = Outputs(json_file, report)
    try:
        outputs.check()
        result = run()
        print(table(result))
        outputs.write(result)
    except (ValueError, OSError) as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from None
