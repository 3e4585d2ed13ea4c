"""Published figures, with the conditions they were measured under: `targets.json`, read and checked.

A target is `blind` if no constant of the cost model has seen it, and `soft` if its conditions are
incomplete: then it is shown but counted nowhere. To submit one, add it to the file: its `kind` says
which of `predict.py`'s functions its conditions are arguments of.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FILE = Path(__file__).parent / "targets.json"


@dataclass(frozen=True, kw_only=True)
class Target:
    """published: in `unit`. kind: how `conditions` are to be understood. source: who published it,
    under which title, when."""

    id: str
    what: str
    source: str
    unit: str
    published: float
    kind: str
    blind: bool
    conditions: Mapping[str, Any]
    soft: bool = False
    note: str = ""

    def __post_init__(self) -> None:
        if not self.published > 0:
            raise ValueError(f"target {self.id}: published must be > 0, got {self.published}")
        if self.blind and self.soft:
            raise ValueError(f"target {self.id}: a soft target cannot be blind")


def read_targets(file: Path = FILE) -> tuple[Target, ...]:
    """Raises ValueError for a target that lacks something, or an id that occurs twice."""
    targets = []
    for values in json.loads(file.read_text(encoding="utf-8")):
        try:
            targets.append(Target(**values))
        except TypeError as error:
            raise ValueError(f"target {values.get('id', '?')}: {error}") from error
    ids = [target.id for target in targets]
    if twice := sorted({name for name in ids if ids.count(name) > 1}):
        raise ValueError(f"target {twice[0]} is there twice")
    return tuple(targets)
