"""`expertmesh simulate scoreboard`: predictions beside what others have published."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("scoreboard")(scoreboard)


def scoreboard(
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Also write JSON.")
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Also write a report with pictures."),
    ] = None,
) -> None:
    """Predict published deployments of DeepSeek-V3 and print every error.

    Blind targets are those that no constant of the cost model has seen. docs/scoreboard.md says how
    it is done, and how to submit a target.
    """
    from deploy.json_file import write_json
    from simulations.report.build import check_report, write_report
    from simulations.scoreboard.board import run, table

    try:
        if json_file is not None and not json_file.absolute().parent.is_dir():
            raise ValueError(f"{json_file}: its directory does not exist")
        if report is not None:
            check_report(report)
        result = run()
        print(table(result))
        write_json(json_file, result)
        if report is not None:
            print(f"report: {write_report([result], report)}")
    except (ValueError, OSError) as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from None
