"""The page: chapters poured into a template, with its style and script inside it."""

from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from simulations.report.balance import balance_chapter
from simulations.report.balance_result import BalanceResult
from simulations.report.chapter import Chapter, Choice, Note
from simulations.report.claims import claims_chapter
from simulations.report.other_results import ClaimsResult, ScoreboardResult, SweepResult
from simulations.report.picture import Picture
from simulations.report.results import Result
from simulations.report.scoreboard import scoreboard_chapter
from simulations.report.serve import serve_chapter
from simulations.report.serve_result import ServeResult
from simulations.report.sweep import sweep_chapter
from simulations.report.tables import Table

_KINDS = {Picture: "picture", Table: "table", Choice: "choice", Note: "note"}


def chapters_of(results: Sequence[Result]) -> list[Chapter]:
    """A chapter for each result, named by its kind: balance, balance-2, serve ..."""
    chapters: list[Chapter] = []
    for result in results:
        before = sum(chapter.result.kind == result.kind for chapter in chapters)
        chapters.append(_chapter(result, f"{result.kind}-{before + 1}" if before else result.kind))
    return chapters


def _chapter(result: Result, name: str) -> Chapter:
    match result:
        case BalanceResult():
            return balance_chapter(result, name)
        case ServeResult():
            return serve_chapter(result, name)
        case ScoreboardResult():
            return scoreboard_chapter(result, name)
        case SweepResult():
            return sweep_chapter(result, name)
        case ClaimsResult():
            return claims_chapter(result, name)
    raise TypeError(f"no chapter for a {type(result).__name__}")


def page_of(chapters: Sequence[Chapter]) -> str:
    """The whole page. Whatever comes from results is escaped; drawings are our own."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {"Markup": Markup, "kind_of": lambda block: _KINDS[type(block)]}
    return environment.get_template("page.html.j2").render(chapters=chapters)
