"""`expertmesh simulate report`: a page of pictures and tables from results of simulations."""

import sys
from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    @app.command()
    def report(
        results: Annotated[
            list[Path], typer.Argument(metavar="FILE.json...", help="What `--json` wrote.")
        ],
        out: Annotated[
            Path, typer.Option(metavar="DIR", help="Where the report goes.", show_default=False)
        ],
    ) -> None:
        """Make report.html, with its pictures, tables and results beside it, from saved results.

        Several results become chapters of one page.
        """
        raise typer.Exit(report_command(results, out))


def report_command(files: list[Path], directory: Path) -> int:
    """Read, draw, write; 2 where the files or the directory cannot be used."""
    from simulations.report.build import write_report
    from simulations.report.errors import ReportError
    from simulations.report.reading import load_results

    try:
        print(write_report(load_results(files), directory))
    except ReportError as error:
        print(error, file=sys.stderr)
        return 2
    return 0
