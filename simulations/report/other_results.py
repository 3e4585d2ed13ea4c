"""What `expertmesh simulate scoreboard`, `sweep` and `claims` found."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from simulations.report.results import NAN, Part, Result
from simulations.report.values import Number, Text, fact, number

Words = Annotated[str, BeforeValidator(fact)]
"""Text, or anything else as a person would write it."""


def _ranking(value: Any) -> str:
    """Choices from the best to the worst."""
    return " > ".join(map(fact, value)) if isinstance(value, list) else fact(value)


Ranking = Annotated[str, BeforeValidator(_ranking)]


def _scalar(value: Any) -> float | str:
    """A number, or else text."""
    if value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
        return number(value)
    return fact(value)


Scalar = Annotated[float | str, BeforeValidator(_scalar)]


class Target(Part):
    """A published figure beside the predicted one; `error` is predicted / published - 1."""

    id: Text
    what: Text = ""
    source: Words = ""
    conditions: Words = ""
    unit: Text = ""
    published: Number = NAN
    predicted: Number = NAN
    error: Number = NAN
    blind: bool = False
    note: Words = ""


class Ordering(Part):
    """Which of two choices is the better one, as published and as predicted."""

    id: Text
    what: Text = ""
    expected: Ranking = ""
    predicted: Ranking = ""
    values: dict[Text, Number] = Field(default_factory=dict)
    right: bool = False


class BlindErrors(Part):
    median_error: Number = NAN
    worst_error: Number = NAN


class ScoreboardResult(Result):
    kind: Literal["scoreboard"]
    targets: tuple[Target, ...] = ()
    soft: tuple[Target, ...] = ()
    """Figures whose conditions are not complete: no part of any statistics."""
    attached: tuple[Target, ...] = ()
    """The blind targets again, given the experts' loads that their authors published."""
    orderings: tuple[Ordering, ...] = ()
    blind: BlindErrors = BlindErrors()
    blind_attached: BlindErrors = BlindErrors()


class SweepPoint(Part):
    """One cluster of the grid, and what became of it; `result` has `status` where it failed."""

    point: dict[Text, Scalar]
    result: dict[Text, Scalar] = Field(default_factory=dict)


class SweepResult(Result):
    kind: Literal["sweep"]
    tpot_ms: Number = NAN
    points: tuple[SweepPoint, ...] = ()


class Claim(Part):
    claim: Words
    published: Words = ""
    baseline: Words = ""
    measured: Words = ""
    command: Words = ""
    verdict: Words = ""
    why: Words = ""


class ClaimsResult(Result):
    kind: Literal["claims"]
    rows: tuple[Claim, ...] = ()
