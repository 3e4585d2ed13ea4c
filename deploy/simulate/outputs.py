"""What a simulation leaves: a JSON file and a report, where they were asked for."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploy.json_file import write_json

INTERRUPTED = 130
"""Exit code of a run that Ctrl-C ended, whose results so far were kept."""


@dataclass(frozen=True)
class Outputs:
    """Files of --json and --report; matplotlib is loaded only for the latter."""

    json_file: Path | None
    report: Path | None

    def check(self) -> None:
        """Before long work. Raises ValueError, or OSError, for what could not be written after it."""
        if self.report is not None:
            from simulations.report.build import check_report

            check_report(self.report)
        if self.json_file is not None and not self.json_file.absolute().parent.is_dir():
            raise ValueError(f"{self.json_file}: its directory does not exist")

    def write(self, result: Mapping[str, Any]) -> None:
        """Write both and say where the report is."""
        write_json(self.json_file, dict(result))
        if self.report is not None:
            from simulations.report.build import write_report

            print(f"wrote {write_report([result], self.report)}")


def command() -> list[str]:
    """The command line as it was given, without where results go."""
    words = ["expertmesh", *sys.argv[1:]]
    for option in ("--json", "--report"):
        while option in words:
            del words[words.index(option) : words.index(option) + 2]
        words = [word for word in words if not word.startswith(f"{option}=")]
    return words
