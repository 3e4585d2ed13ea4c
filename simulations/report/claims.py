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
    table = Table(
        name=f"{name}-table",
        caption="Each row with its baseline, and the command that measures it alone.",
        columns=[
            Column(title="claim", wide=True),
            Column(title="published", wide=True),
            Column(title="baseline", wide=True),
            Column(title="measured", wide=True),
            Column(title="verdict", tones=VERDICTS),
            Column(title="why", wide=True),
            Column(title="command", wide=True, code=True),
        ],
        rows=[
            (
                row.claim,
                row.published,
                row.baseline,
                row.measured,
                row.verdict,
                row.why,
                row.command,
            )
            for row in result.rows
        ],
    )
    return Chapter(
        name=name,
        title=title_of(result, "Claims examined"),
        result=result,
        facts=facts_of(result),
        sections=[Section(title="Claims", blocks=[table])],
    )
