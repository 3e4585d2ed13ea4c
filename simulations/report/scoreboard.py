"""The chapter of `simulate scoreboard`: every published figure with its error."""

import math
from functools import partial

from simulations.report import scoreboard_figures as figures
from simulations.report.chapter import Block, Chapter, Note, Section, facts_of, title_of
from simulations.report.other_results import ScoreboardResult, Target
from simulations.report.picture import draw
from simulations.report.tables import SIGNIFICANT, Column, Table


def scoreboard_chapter(result: ScoreboardResult, name: str) -> Chapter:
    sections = [_summary(result), _pictures(result, name), _errors(result, name)]
    if result.orderings:
        sections.append(_orderings(result, name))
    return Chapter(
        name=name,
        title=title_of(result, "Predictions beside published figures"),
        result=result,
        facts=facts_of(result),
        sections=[section for section in sections if section is not None],
    )


def _summary(result: ScoreboardResult) -> Section:
    blind = sum(target.blind for target in result.targets)
    right = sum(ordering.right for ordering in result.orderings)
    lines = [
        f"{len(result.targets)} published figures, {blind} of them predicted blind: nothing in the "
        "simulator was fitted to those."
    ]
    if not math.isnan(result.blind.median_error + result.blind.worst_error):
        lines.append(
            f"The median error of the blind ones is {_percent(result.blind.median_error)}, the worst "
            f"{_percent(result.blind.worst_error)}."
        )
    if result.orderings:
        lines.append(f"{right} of {len(result.orderings)} orderings came out right.")
    return Section(title="Summary", blocks=[Note(text=" ".join(lines))])


def _percent(share: float) -> str:
    return f"{abs(share):.1%}".replace("%", " %")


def _pictures(result: ScoreboardResult, name: str) -> Section | None:
    blocks: list[Block] = []
    drawn = figures.usable(result.targets)
    if drawn:
        blocks.append(
            draw(
                f"{name}-scatter",
                "Predicted against published",
                "On the line the prediction is exact; to the right, how far from it. Circles were "
                "predicted blind; squares are figures that constants were taken from.",
                "Predicted against published values on logarithmic scales, and their errors with bands "
                "of 5 and of 10 per cent.",
                partial(figures.scatter, targets=drawn),
                height=4.6,
            )
        )
    known = [target for target in result.targets if not math.isnan(target.error)]
    if known:
        blocks.append(
            draw(
                f"{name}-errors",
                "Error of each prediction",
                "To the right the prediction is too high, to the left too low.",
                "A point for the error of each target, with bands of 5 and of 10 per cent.",
                partial(figures.errors, targets=known),
                height=1.0 + 0.24 * len(known),
                width=9.6,
            )
        )
    return Section(title="Pictures", blocks=blocks) if blocks else None


def _errors(result: ScoreboardResult, name: str) -> Section:
    table = Table(
        name=f"{name}-targets",
        caption="Error: predicted / published − 1.",
        columns=[
            Column(title="id"),
            Column(title="what", wide=True),
            Column(title="published", form=SIGNIFICANT),
            Column(title="predicted", form=SIGNIFICANT),
            Column(title="unit"),
            Column(title="error", unit="%", form="+.1f"),
            Column(title="", tones={"blind": "good", "in-sample": "quiet"}),
            Column(title="conditions", wide=True),
            Column(title="source", wide=True),
        ],
        rows=[_row(target) for target in result.targets],
    )
    return Section(title="Every figure", blocks=[table])


def _row(target: Target) -> tuple[str | float, ...]:
    return (
        target.id,
        target.what,
        target.published,
        target.predicted,
        target.unit,
        100 * target.error,
        figures.LOOKS[target.blind][2],
        target.conditions,
        target.source,
    )


def _orderings(result: ScoreboardResult, name: str) -> Section:
    table = Table(
        name=f"{name}-orderings",
        caption="Which of two choices is better, as published and as predicted.",
        columns=[
            Column(title="id"),
            Column(title="what", wide=True),
            Column(title="published", wide=True),
            Column(title="predicted", wide=True),
            Column(title="", tones={"right": "good", "wrong": "bad"}),
        ],
        rows=[
            (one.id, one.what, one.expected, one.predicted, "right" if one.right else "wrong")
            for one in result.orderings
        ],
    )
    return Section(title="Orderings", blocks=[table])
