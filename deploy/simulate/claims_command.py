"""What `expertmesh simulate claims` does: examine, print a paragraph for each row, write."""

from __future__ import annotations

import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from deploy.leaving import Leaving
from deploy.simulate.outputs import INTERRUPTED, Outputs, command
from simulations.claims.claims import Study, rows_of
from simulations.hardware.calibration import Calibration

COLOURS = {"reproduces": "green", "partly": "yellow", "does not": "red", "skipped": "dim"}


def claims_command(
    *,
    trace: Path | None,
    only: str,
    steps: int,
    seed: int,
    calibration: str,
    outputs: Outputs,
) -> int:
    """0; 2 for what cannot be; 130 on Ctrl-C, with the rows that were done written."""
    torch.set_num_threads(1)  # the same sums on every machine, and nothing is worth a second one
    rows: list[dict[str, Any]] = []
    interrupted = False
    try:
        study = Study(
            calibration=Calibration.load(calibration),
            trace=trace,
            only=tuple(name.strip() for name in only.split(",")),
            steps=steps,
            seed=seed,
        )
        outputs.check()
        try:
            _examine(study, rows)
        except KeyboardInterrupt:
            interrupted = True
        result = _result(study, rows, interrupted)
        outputs.write(result)
    except (ValueError, OSError) as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return 2
    return INTERRUPTED if interrupted else 0


def _examine(study: Study, rows: list[dict[str, Any]]) -> None:
    """Print and keep each row as it comes."""
    console, status = Console(highlight=False), Console(stderr=True).status("")
    with Leaving().handled(), status:
        for row in rows_of(study, status.update):
            rows.append(row)
            _show(console, row)


def _show(console: Console, row: dict[str, Any]) -> None:
    verdict = row["verdict"]
    console.print(Text(f"{row['claim']}: {verdict}", style=f"bold {COLOURS[verdict]}"))
    for name in ("baseline", "measured", "why", "command"):
        if row[name]:
            console.print(Padding(Text(f"{name}: {row[name]}"), (0, 0, 0, 4)))


def _result(study: Study, rows: list[dict[str, Any]], interrupted: bool) -> dict[str, Any]:
    result: dict[str, Any] = {
        "kind": "claims",
        "version": version("expertmesh"),
        "seed": study.seed,
        "command": command(),
        "calibration": {"name": study.calibration.name, "hash": study.calibration.hash},
        "steps": study.steps,
        "warnings": list(dict.fromkeys(text for row in rows for text in row["warnings"])),
        "rows": rows,
    }
    if interrupted:
        result["interrupted"] = True
    return result
