"""Options that several simulations take, said once."""

from pathlib import Path
from typing import Annotated

import typer

CLUSTER, LOAD, RESULT = "Cluster", "Load", "Result"

Preset = Annotated[
    str,
    typer.Option(
        help="A model by name, a config.json, or a directory with one.", rich_help_panel=CLUSTER
    ),
]
Nodes = Annotated[int, typer.Option(rich_help_panel=CLUSTER)]
RanksPerNode = Annotated[int, typer.Option(rich_help_panel=CLUSTER)]
TpSize = Annotated[
    int, typer.Option(help="Ranks that share one attention.", rich_help_panel=CLUSTER)
]
RedundantExperts = Annotated[
    int | None,
    typer.Option(
        help="Further copies of experts; if not given, one spare slot a rank.",
        rich_help_panel=CLUSTER,
    ),
]
Weights = Annotated[str, typer.Option(help="float8 or bfloat16.", rich_help_panel=CLUSTER)]
Dispatcher = Annotated[
    str, typer.Option(help="hierarchical, flat or low_latency.", rich_help_panel=CLUSTER)
]
Overlap = Annotated[str, typer.Option(help="none or two_batch.", rich_help_panel=CLUSTER)]
CalibrationName = Annotated[
    str, typer.Option(help="What the hardware achieves: name or file.", rich_help_panel=CLUSTER)
]
Skew = Annotated[
    float | None,
    typer.Option(
        help="Log-sd of experts' loads, or exponent of zipf; if not given, the workload's usual one.",
        rich_help_panel=LOAD,
    ),
]
Seed = Annotated[int, typer.Option(help="Same seed, same result.")]
JsonFile = Annotated[
    Path | None,
    typer.Option("--json", metavar="FILE", help="Also write JSON.", rich_help_panel=RESULT),
]
ReportDirectory = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Also write a report with pictures.", rich_help_panel=RESULT),
]
