"""The chapter of `simulate claims`: what is said of expert parallelism, and what comes out."""

from simulations.report.chapter import Chapter, Section, facts_of, title_of
from simulations.report.other_results import ClaimsResult
from simulations.report.tables import Column, Table

VERDICTS = {
    "reproduces": "good",
    "partly": "quiet",
    "does not": "bad",
    "does not reproduce": "bad",
    "skipped": "quiet",
}


def claims_chapter(result: ClaimsResult, name: str) -> Chapter:
    claims = Table(
        name=f"{name}-table",
        caption="What is published, beside what was measured against which baseline.",
        columns=[
            Column(title="claim", wide=True),
            Column(title="published"),
            Column(title="baseline", wide=True),
            Column(title="measured", wide=True),
            Column(title="verdict", tones=VERDICTS),
            Column(title="why", wide=True),
        ],
        rows=[
            (row.claim, row.published, row.baseline, row.measured, row.verdict, row.why)
            for row in result.rows
        ],
    )
    commands = Table(
        name=f"{name}-commands",
        caption="The command that measures each alone.",
        columns=[Column(title="claim", wide=True), Column(title="command", wide=True, code=True)],
        rows=[(row.claim, row.command) for row in result.rows],
    )
    return Chapter(
        name=name,
        title=title_of(result, "Claims examined"),
        result=result,
        facts=facts_of(result),
        sections=[Section(title="Claims", blocks=[claims, commands])],
    )
