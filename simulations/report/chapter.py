"""What a page is made of: a chapter for each result, sections in it, and blocks in those."""

import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain, count

from simulations.report.picture import Picture
from simulations.report.results import Result
from simulations.report.tables import DataFile, Table
from simulations.report.values import fact


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Pictures of which two are shown side by side, at first those at `shown`, in a page with scripts;
    in one without, all of them."""

    name: str
    labels: Sequence[str]
    pictures: Sequence[Picture]
    shown: tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Note:
    """A paragraph, or terms with their explanations."""

    text: str = ""
    terms: Sequence[tuple[str, str, str]] = ()
    """(term, colour, explanation)."""


Block = Picture | Table | Choice | Note


@dataclass(frozen=True, kw_only=True)
class Section:
    title: str
    blocks: Sequence[Block]
    text: str = ""


@dataclass(frozen=True, kw_only=True)
class Chapter:
    """One result: its name (which file names begin with), its head, its sections."""

    name: str
    title: str
    result: Result
    facts: Sequence[tuple[str, str]]
    sections: Sequence[Section]
    data: Sequence[DataFile] = field(default=())

    def pictures(self) -> list[Picture]:
        found: list[Picture] = []
        for block in self._blocks():
            if isinstance(block, Picture):
                found.append(block)
            elif isinstance(block, Choice):
                found += block.pictures
        return found

    def data_files(self) -> list[DataFile]:
        tables = [block for block in self._blocks() if isinstance(block, Table)]
        return [*(table.data() for table in tables), *self.data]

    def _blocks(self) -> list[Block]:
        return [block for section in self.sections for block in section.blocks]


def slugs(names: Iterable[str]) -> list[str]:
    """A part of a file name for each of these, none like another."""
    given: list[str] = []
    for name in names:
        slug = re.sub("[^a-z0-9]+", "-", name.lower()).strip("-")[:40] or "x"
        others = (f"{slug}-{number}" for number in count(2))
        given.append(next(free for free in chain([slug], others) if free not in given))
    return given


def facts_of(result: Result) -> list[tuple[str, str]]:
    """The head of a result as terms and values; what is not known is left out."""
    calibrations = result.calibrations or {result.calibration.name: result.calibration.hash}
    known = [
        ("model", _all_of(result.model)),
        ("cluster", _all_of(result.cluster)),
        ("workload", _all_of(result.workload)),
        ("steps", "" if result.steps is None else f"{result.steps:,}"),
        ("tokens per rank", fact(result.tokens_per_rank)),
        ("seed", result.seed),
        ("further", _all_of(result.others)),
        ("calibration", ", ".join(f"{n} ({h})" for n, h in calibrations.items() if n or h)),
        ("expertmesh", result.version),
        ("command", shlex.join(result.command)),
    ]
    return [(term, value) for term, value in known if value not in ("", "nan", "–")]


def _all_of(facts: dict[str, str]) -> str:
    """`deepseek-v3 · num_nodes 8 · ...`: a name first, then everything by its name."""
    named = [facts["name"]] if facts.get("name") else []
    others = [
        f"{key.removeprefix('num_').replace('_', ' ')} {value}"
        for key, value in facts.items()
        if key != "name"
    ]
    return " · ".join(named + others)


def title_of(result: Result, what: str) -> str:
    """What was simulated, on which model and how large a cluster, as far as the result says."""
    nodes, ranks = result.count("num_nodes"), result.count("ranks_per_node")
    model = result.model.get("name", "")
    size = f"{nodes} nodes × {ranks} ranks" if nodes and ranks else ""
    if nodes == 1 and ranks:
        size = f"one node of {ranks} ranks"
    about = " on ".join(part for part in (model, size) if part)
    return f"{what}: {about}" if about else what
