"""What a command found, for programs."""

import json
from pathlib import Path
from typing import Any

from simulations.whole_file import write_whole


def write_json(path: Path | None, report: dict[str, Any]) -> None:
    """Write a report, if the user asked for one: whole, or not at all."""
    if path is None:
        return
    text = json.dumps(report, indent=2, ensure_ascii=False) + "\n"
    if path.exists() and not path.is_file():  # a pipe or /dev/stdout: nothing to exchange
        path.write_text(text, encoding="utf-8")
        return
    write_whole(path, text)
