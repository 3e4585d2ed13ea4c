"""`expertmesh doctor`: would this configuration start on that Ray cluster, and if not, what to do.

Exit codes: 0 no problem (warnings may be); 1 problems, or no Ray to look at; 2 a configuration that
cannot be.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import ray
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cluster.config import ConfigError
from deploy.doctor.checks import examine
from deploy.doctor.gather import gather
from deploy.doctor.situation import Finding
from deploy.json_file import write_json
from deploy.ray_connection import NoRayError, connect_to_ray
from deploy.settings import read_config

_FIX = "start one with `ray start --head`, run this on one of its hosts, or give --address"
_COLORS = {"ok": "green", "warning": "yellow", "problem": "bold red"}


def doctor_command(
    path: Path | None, overrides: Sequence[str], address: str, json_file: Path | None
) -> int:
    try:
        config = read_config(path, overrides)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    try:
        connect_to_ray(address, _FIX, logging_level=logging.ERROR, log_to_driver=False)
    except NoRayError as error:
        print(error, file=sys.stderr)
        return 1
    try:
        findings = examine(gather(config))
    finally:
        ray.shutdown()
    Console().print(table_of(findings))
    print(summary(findings))
    write_json(json_file, {"findings": [asdict(finding) for finding in findings]})
    return int(any(finding.status == "problem" for finding in findings))


def table_of(findings: Sequence[Finding]) -> Table:
    """One line per check; below it what to do, where something is wrong."""
    table = Table.grid(padding=(0, 2, 0, 0))
    for finding in findings:
        status = Text(finding.status, style=_COLORS[finding.status])
        table.add_row(status, Text(finding.check), Text(finding.message))
        if finding.fix:
            table.add_row("", "", Text.assemble(("fix: ", "bold"), finding.fix))
    return table


def summary(findings: Sequence[Finding]) -> str:
    number = {s: sum(f.status == s for f in findings) for s in ("ok", "warning", "problem")}
    told = [f"{number['ok']} checks are fine"]
    if number["warning"]:
        told.append(f"{number['warning']} worth a look")
    told.append(
        f"{number['problem']} to be fixed first" if number["problem"] else "ready to deploy"
    )
    return ", ".join(told)
