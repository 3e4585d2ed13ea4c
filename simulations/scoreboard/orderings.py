"""What published ablations put in order, and the order that we predict: `orderings.json`.

The items of an ordering are written from the largest to the smallest, as published. It is right if
the predictions fall in that order too, strictly unless it has `slack`: by so large a share may one
exceed its predecessor where "no more than" is all that is published.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from simulations.scoreboard.predict import predict

FILE = Path(__file__).parent / "orderings.json"


@dataclass(frozen=True, kw_only=True)
class Ordering:
    """items: label to a prediction, its kind and its conditions."""

    id: str
    what: str
    source: str
    items: Mapping[str, Mapping[str, Any]]
    slack: float = 0.0

    def __post_init__(self) -> None:
        if len(self.items) < 2:
            raise ValueError(f"ordering {self.id}: needs two items, got {len(self.items)}")

    def result(self) -> dict[str, Any]:
        """As in the JSON result of the scoreboard."""
        values = {label: _value(item) for label, item in self.items.items()}
        predicted = sorted(values, key=lambda label: -values[label])
        pairs = pairwise(values.values())
        if self.slack:
            right = all(left * (1 + self.slack) >= then for left, then in pairs)
        else:
            right = all(left > then for left, then in pairs)
        return {
            "id": self.id,
            "what": self.what,
            "source": self.source,
            "expected": list(self.items),
            "predicted": predicted,
            "values": {label: float(f"{values[label]:.5g}") for label in self.items},
            "right": right,
        }


def read_orderings(file: Path = FILE) -> tuple[Ordering, ...]:
    """Raises ValueError for an ordering of fewer than two items."""
    return tuple(
        Ordering(
            id=values["id"],
            what=values["what"],
            source=values["source"],
            items={item["label"]: item["prediction"] for item in values["items"]},
            slack=values.get("slack", 0.0),
        )
        for values in json.loads(file.read_text(encoding="utf-8"))
    )


def _value(prediction: Mapping[str, Any]) -> float:
    if prediction["kind"] == "constant":
        return float(prediction["value"])
    return predict(prediction["kind"], {k: v for k, v in prediction.items() if k != "kind"})
