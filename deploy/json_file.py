"""What a command found, for programs."""

import json
from pathlib import Path
from typing import Any


def write_json(path: Path | None, report: dict[str, Any]) -> None:
    """Write a report, if the user asked for one."""
    if path is not None:
        path.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
