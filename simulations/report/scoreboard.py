"""The chapter of `simulate scoreboard`: every published figure with its error."""

import math
from collections.abc import Sequence
from functools import partial

from simulations.report import scoreboard_figures as figures
from simulations.report.chapter import Block, Chapter, Note, Section, facts_of, title_of
from simulations.report.other_results import Ordering, ScoreboardResult, Target
from simulations.report.picture import draw
from simulations.report.tables import SIGNIFICANT, Column, Table


def scoreboard_chapter(result: ScoreboardResult, name: str) -> Chapter:
    sections = [_summary(result), _pictures(result, name), _targets(result, name)]
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
    for whose, errors in (
        ("the blind ones", result.blind),
        ("the same, given the experts' loads,", result.blind_attached),
    ):
        if not math.isnan(errors.median_error + errors.worst_error):
            lines.append(
                f"The median error of {whose} is {_percent(errors.median_error)}, the worst "
                f"{_percent(errors.worst_error)}."
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
    known = sorted(
        (target for target in result.targets if not math.isnan(target.error)),
        key=lambda target: not target.blind,
    )
    if known:
        blocks.append(
            draw(
                f"{name}-errors",
                "Error of each prediction",
                "To the right the prediction is too high, to the left too low.",
                "A point for the error of each target, with bands of 5 and of 10 per cent.",
                partial(figures.errors, targets=known),
                height=1.0 + 0.2 * len(known),
            )
        )
    return Section(title="Pictures", blocks=blocks) if blocks else None


def _targets(result: ScoreboardResult, name: str) -> Section:
    blocks: list[Block] = [
        _table(result.targets, f"{name}-targets", "Error: predicted / published − 1."),
        _conditions((*result.targets, *result.soft), f"{name}-conditions"),
    ]
    if result.attached:
        caption = "The blind ones again, given the experts' loads that their authors published."
        blocks.insert(1, _table(result.attached, f"{name}-given-loads", caption, "given loads"))
    if result.soft:
        caption = "Not counted: the conditions of these are not published in full."
        blocks.insert(1, _table(result.soft, f"{name}-soft", caption))
    return Section(title="Every figure", blocks=blocks)


def _table(targets: Sequence[Target], name: str, caption: str, sort: str = "") -> Table:
    """`sort` of all of them; if empty, blind or in-sample."""
    return Table(
        name=name,
        caption=caption,
        columns=[
            Column(title="id"),
            Column(title="what", wide=True),
            Column(title="published", form=SIGNIFICANT),
            Column(title="predicted", form=SIGNIFICANT),
            Column(title="unit"),
            Column(title="error", unit="%", form="+.1f"),
            Column(title="", tones={"blind": "good", "in-sample": "quiet"}),
            Column(title="note", wide=True),
        ],
        rows=[
            (
                t.id,
                t.what,
                t.published,
                t.predicted,
                t.unit,
                100 * t.error,
                sort or _sort(t),
                t.note,
            )
            for t in targets
        ],
    )


def _sort(target: Target) -> str:
    return figures.LOOKS[target.blind][2]


def _conditions(targets: Sequence[Target], name: str) -> Table:
    return Table(
        name=name,
        caption="Under which conditions each was published, and where.",
        columns=[
            Column(title="id"),
            Column(title="source", wide=True),
            Column(title="conditions", wide=True),
        ],
        rows=[(target.id, target.source, target.conditions) for target in targets],
        folded=True,
    )


def _orderings(result: ScoreboardResult, name: str) -> Section:
    table = Table(
        name=f"{name}-orderings",
        caption="Which choice is better, as published and as predicted, from the best to the worst.",
        columns=[
            Column(title="what", wide=True),
            Column(title="published", wide=True),
            Column(title="predicted", wide=True),
            Column(title="", tones={"right": "good", "wrong": "bad"}),
        ],
        rows=[
            (one.what or one.id, one.expected, _predicted(one), "right" if one.right else "wrong")
            for one in result.orderings
        ],
    )
    return Section(title="Orderings", blocks=[table])


def _predicted(ordering: Ordering) -> str:
    """The predicted order, with its values where the result has them."""
    names = ordering.predicted.split(" > ")
    return " > ".join(
        f"{name} {ordering.values[name]:,.4g}" if name in ordering.values else name
        for name in names
    )
