"""Tables: typed columns, shown in the page with units and kept whole in a CSV file."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from simulations.report.results import Series
from simulations.report.values import FloatArray

SIGNIFICANT = "significant"
"""The form of numbers of very different size: five digits, or all before the point."""
Value = str | float | int | None


@dataclass(frozen=True, kw_only=True)
class Column:
    """`form`: how numbers are written ("" = a column of text). `best`: which of the numbers is marked.

    `tones`: the look of certain texts: "good", "bad" or "quiet".
    """

    title: str
    unit: str = ""
    form: str = ""
    best: Literal["", "low", "high"] = ""
    tones: Mapping[str, str] = field(default_factory=dict)
    wide: bool = False
    code: bool = False

    @property
    def header(self) -> str:
        """The name of the column in a CSV file."""
        return f"{self.title} ({self.unit})" if self.unit else self.title

    def show(self, value: Value) -> str:
        """A value as the page has it; "–" where it is not known."""
        if value is None or (isinstance(value, float) and math.isnan(value)):
            return "–"
        if isinstance(value, str):
            return value
        if self.form == SIGNIFICANT or not self.form:
            text = f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:,.5g}"
        else:
            text = format(value, self.form)
        return text.replace("-", "−")


@dataclass(frozen=True, kw_only=True)
class Table:
    """`name` is that of its CSV file; `swatches`: a colour for each row; `folded`: shown on demand."""

    name: str
    caption: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Value]]
    swatches: Sequence[str] = ()
    folded: bool = False

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(
                    f"{self.name}: {len(row)} values for {len(self.columns)} columns: {row}"
                )

    def best(self) -> set[tuple[int, int]]:
        """(row, column) of the values that are the best of at least two different ones."""
        marked = set()
        for c, column in enumerate(self.columns):
            known = {r: row[c] for r, row in enumerate(self.rows) if _is_known(row[c])}
            numbers = [float(value) for value in known.values() if value is not None]
            if not column.best or not numbers or min(numbers) == max(numbers):
                continue
            best = column.show(min(numbers) if column.best == "low" else max(numbers))
            marked |= {(r, c) for r, value in known.items() if column.show(value) == best}
        return marked

    def data(self) -> "DataFile":
        """The same for a file: the units in the header, numbers in full."""
        header = [column.header for column in self.columns]
        columns = [[row[c] for row in self.rows] for c in range(len(header))]
        return DataFile(name=self.name, header=header, columns=columns)


@dataclass(frozen=True, kw_only=True)
class DataFile:
    """Columns of numbers or text for a CSV file of this name."""

    name: str
    header: Sequence[str]
    columns: Sequence[Sequence[Value] | FloatArray]

    def csv(self) -> str:
        """Comma-separated as in RFC 4180; empty where a value is not known."""
        out = io.StringIO()
        writer = csv.writer(out)
        writer.writerow(self.header)
        writer.writerows(
            [_in_full(value) for value in row] for row in zip(*self.columns, strict=True)
        )
        return out.getvalue()


def curves(name: str, series: Series) -> DataFile:
    """Every curve of `series` that is there, under the names that the result has for them."""
    known = {key: values for key, values in series if values.size}
    return DataFile(name=name, header=list(known), columns=list(known.values()))


def cells(name: str, header: Sequence[str], map_RC: FloatArray) -> DataFile:
    """One row for each cell: its row, its column, its value."""
    rows, columns = np.indices(map_RC.shape).reshape(2, -1)
    values = [rows.tolist(), columns.tolist(), map_RC.ravel().tolist()]
    return DataFile(name=name, header=header, columns=values)


def _is_known(value: Value) -> bool:
    return isinstance(value, int | float) and not math.isnan(value)


def _in_full(value: Value) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return value if isinstance(value, str) else format(value, ".12g")
