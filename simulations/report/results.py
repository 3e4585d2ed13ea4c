"""What every result of a simulation says of itself, and how one is read.

Each kind of result is a class of models that a report reads: keys that are missing are not known and
leave their part of the report out; keys that are there must be what they should be.
"""

from collections.abc import Sequence
from typing import Annotated, Any, Self, TypeVar

import numpy as np
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from simulations.report.values import Facts, FloatArray, Number, Text, Whole, printable

NAN = float("nan")
NO_LINE: FloatArray = np.zeros(0)
NO_GRID: FloatArray = np.zeros((0, 0))


UNSTABLE = ("steps_per_s",)
"""Entries that two runs of one command may differ in: a report has them in results.json only."""


class Part(BaseModel):
    """A part of a result. Keys that nobody knows are passed over."""

    model_config = ConfigDict(frozen=True, extra="ignore", arbitrary_types_allowed=True)


class Series(Part):
    """Curves over one axis, which is the first field: each is as long as that, or absent."""

    def __len__(self) -> int:
        """The number of points."""
        return len(getattr(self, next(iter(type(self).model_fields))))

    @model_validator(mode="after")
    def _equally_long(self) -> Self:
        axis, *curves = type(self).model_fields
        for name in curves:
            length = len(getattr(self, name))
            if length not in (0, len(self)):
                raise ValueError(f"{name} has {length} points where {axis} has {len(self)}")
        return self


class Calibration(Part):
    name: Text = ""
    hash: Text = ""


class Result(Part):
    """The head: what was simulated, by which version, from which seed and constants."""

    kind: Text
    version: Text = ""
    seed: Annotated[str, BeforeValidator(lambda seed: printable(str(seed)))] = ""
    command: tuple[Text, ...] = ()
    calibration: Calibration = Calibration()
    calibrations: Facts = Field(default_factory=dict)
    model: Facts = Field(default_factory=dict)
    cluster: Facts = Field(default_factory=dict)
    workload: Facts = Field(default_factory=dict)
    steps: Whole = None
    tokens_per_rank: Number = NAN
    warnings: tuple[Text, ...] = ()
    interrupted: bool = False
    others: Facts = Field(default_factory=dict)
    """What else the result says in a word or a number."""

    @model_validator(mode="before")
    @classmethod
    def _with_others(cls, raw: Any) -> Any:
        known = {*cls.model_fields, *UNSTABLE}
        others = {
            k: v for k, v in raw.items() if k not in known and isinstance(v, str | int | float)
        }
        return {**raw, "others": others}

    def count(self, name: str) -> int | None:
        """A whole number of `cluster`, such as num_nodes; None if it is not there."""
        digits = self.cluster.get(name, "").replace(",", "")
        return int(digits) if digits.isdecimal() and 0 < int(digits) <= 10**7 else None


R = TypeVar("R", bound=Result)


def of_kind(results: Sequence[Result], kind: type[R]) -> list[R]:
    return [result for result in results if isinstance(result, kind)]
