"""What a command found, for programs."""

import json
import os
from pathlib import Path
from typing import Any


def write_json(path: Path | None, report: dict[str, Any]) -> None:
    """Write a report, if the user asked for one: whole, or not at all."""
    if path is None:
        return
    text = json.dumps(report, indent=2, ensure_ascii=False) + "\n"
    if path.exists() and not path.is_file():  # a pipe or /dev/stdout: nothing to exchange
        path.write_text(text, encoding="utf-8")
        return
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_text(text, encoding="utf-8")
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
