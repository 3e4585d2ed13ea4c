"""The scoreboard: every target beside its prediction, the orderings, and how far off it all is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from statistics import median
from typing import Any

from simulations.hardware.calibration import Calibration
from simulations.scoreboard.constants import NAMES
from simulations.scoreboard.orderings import read_orderings
from simulations.scoreboard.predict import NUM_BATCHES, SEED, predict
from simulations.scoreboard.targets import Target, read_targets

_NAMES = {
    "in_sample": "in-sample",
    "blind": "blind",
    "blind_attached": "given loads",
}
COMMAND = ("expertmesh", "simulate", "scoreboard")


def run() -> dict[str, Any]:
    """The JSON result; `soft` targets are apart from `targets`, and in no statistics.
    `attached`: the blind ones again, with the experts' loads that `skew.py` calls so; statistics of
    their own."""
    rows = [(target, _row(target)) for target in read_targets()]
    attached = [_row(_attached(target)) for target, _ in rows if target.blind]
    hashes = {name: Calibration.named(name).hash for name in NAMES}
    return {
        "kind": "scoreboard",
        "version": version("expertmesh"),
        "seed": SEED,
        "command": list(COMMAND),
        "calibration": {"name": NAMES[0], "hash": hashes[NAMES[0]]},
        "calibrations": hashes,
        "batches": NUM_BATCHES,
        "targets": [row for target, row in rows if not target.soft],
        "soft": [row for target, row in rows if target.soft],
        "attached": attached,
        "orderings": [ordering.result() for ordering in read_orderings()],
        "blind": _statistics(row for target, row in rows if target.blind),
        "in_sample": _statistics(
            row for target, row in rows if not target.blind and not target.soft
        ),
        "blind_attached": _statistics(attached),
    }


def _attached(target: Target) -> Target:
    """The same, its experts' loads attached; no longer blind."""
    conditions = {
        key: {**value, "loads": "attached"} if isinstance(value, Mapping) else value
        for key, value in target.conditions.items()
    }
    if target.kind != "ratio":
        conditions["loads"] = "attached"
    return replace(target, conditions=conditions, blind=False)


def _row(target: Target) -> dict[str, Any]:
    """error = predicted / published - 1."""
    predicted = predict(target.kind, target.conditions)
    return {
        "id": target.id,
        "what": target.what,
        "source": target.source,
        "conditions": {"kind": target.kind, **target.conditions},
        "unit": target.unit,
        "published": target.published,
        "predicted": float(f"{predicted:.5g}"),
        "error": round(predicted / target.published - 1, 4),
        "blind": target.blind,
        "note": target.note,
    }


def _statistics(rows: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Of absolute errors."""
    errors = sorted(abs(row["error"]) for row in rows)
    return {
        "targets": len(errors),
        "median_error": round(median(errors), 4),
        "worst_error": errors[-1],
    }


def table(result: dict[str, Any]) -> str:
    """For people, 80 columns wide."""
    blind = [row for row in result["targets"] if row["blind"]]
    in_sample = [row for row in result["targets"] if not row["blind"]]
    parts = [
        _table("In-sample: constants were taken from these", in_sample),
        _table("Soft: conditions incomplete, counted nowhere", result["soft"]),
        _table("Blind: no constant has seen these", blind),
        _table("The same, given the experts' loads", result["attached"]),
        "\n".join(["Orderings", *map(_ordering, result["orderings"])]),
        "\n".join(
            _summary(name, result[name]) for name in ("in_sample", "blind", "blind_attached")
        ),
    ]
    return "\n\n".join(parts)


def _table(title: str, rows: Sequence[dict[str, Any]]) -> str:
    head = f"{title:<52.52} {'published':>9} {'predicted':>9} {'error':>7}"
    lines = [
        f"{row['id']:<20} {row['what']:<31.31} {_shown(row['published']):>9} "
        f"{_shown(row['predicted']):>9} {100 * row['error']:>+6.1f}%"
        for row in rows
    ]
    return "\n".join([head, *lines])


def _ordering(row: dict[str, Any]) -> str:
    said = " > ".join(f"{label} {_shown(row['values'][label])}" for label in row["predicted"])
    verdict = "right" if row["right"] else f"WRONG, published: {' > '.join(row['expected'])}"
    return f"  {row['what']}\n    {said}: {verdict}"


def _summary(name: str, statistics: dict[str, Any]) -> str:
    return (
        f"{_NAMES[name]}: {statistics['targets']} targets, absolute error "
        f"median {100 * statistics['median_error']:.1f} %, "
        f"worst {100 * statistics['worst_error']:.1f} %"
    )


def _shown(value: float) -> str:
    return f"{value:.0f}" if value >= 1000 else f"{value:.4g}"
