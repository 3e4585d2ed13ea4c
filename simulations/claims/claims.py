"""What is said of expert parallelism, beside what comes out here: a row for each claim and routing.

    traffic          60 % fewer bytes between nodes
    difference       less than 10 % between the loads of ranks
    throughput       30 % more tokens/s by balancing load
    tensor_parallel  3.2 times the throughput and half the latency of tensor parallelism

No public source of the first three was found, nor their baselines, so each row names the one it
takes. Routing is DeepSeek-V3's on 8 nodes x 8 ranks, drawn, and DeepSeek-V2-Lite's on 4 x 4, recorded.

A row: {"id", "claim", "published", "baseline", "measured", "command", "verdict", "why", "figures",
"warnings"};
verdict is "reproduces", "partly", "does not" or, without a trace, "skipped". `figures` has all numbers:
every policy, and what the row's module says. `warnings`: what had to be extrapolated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simulations.balance.load_balance import make_loads
from simulations.claims.against_tensor_parallel import tensor_parallel_row
from simulations.claims.balance import difference_row, throughput_row
from simulations.claims.datasets import Dataset, drawn, recorded
from simulations.claims.traffic import traffic_row
from simulations.hardware.calibration import Calibration

Row = dict[str, Any]
Progress = Callable[[str], None]

BY_ROUTING: dict[str, Callable[[Dataset], Row]] = {
    "traffic": traffic_row,
    "difference": difference_row,
    "throughput": throughput_row,
}
CLAIMS = (*BY_ROUTING, "tensor_parallel")


@dataclass(frozen=True, kw_only=True)
class Study:
    """only: the ids of CLAIMS to examine. Raises ValueError for others."""

    calibration: Calibration
    trace: Path | None = None
    only: tuple[str, ...] = CLAIMS
    steps: int = 500
    seed: int = 0

    def __post_init__(self) -> None:
        for name in self.only or ("",):
            if name not in CLAIMS:
                raise ValueError(f"unknown claim {name!r}: choose from {', '.join(CLAIMS)}")
        if self.steps < 1 or self.seed < 0:
            raise ValueError(f"steps({self.steps}) must be >= 1 and seed({self.seed}) >= 0")


def rows_of(study: Study, progress: Progress = lambda text: None) -> Iterator[Row]:
    """One after the other. Raises LoadFileError for a trace that does not fit, DoesNotFit."""
    made = {"steps": study.steps, "seed": study.seed}
    datasets = {"drawn": drawn(study.calibration, **made)}
    if study.trace is not None:
        datasets["recorded"] = recorded(study.calibration, study.trace, **made)
        make_loads(datasets["recorded"].spec, 0)  # refuses a trace before anything has begun
    for claim in study.only:
        if claim == "tensor_parallel":
            row = tensor_parallel_row(study.calibration, seed=study.seed, progress=progress)
            yield {"id": claim, **row}
            continue
        for name in ("drawn", "recorded"):
            progress(f"{claim}, {name} routing")
            dataset = datasets.get(name)
            row = BY_ROUTING[claim](dataset) if dataset else _skipped(claim)
            yield {"id": f"{claim}_{name}", "warnings": [], **row}


def _skipped(claim: str) -> Row:
    return {
        "claim": f"{claim}: DeepSeek-V2-Lite, 4 x 4 ranks, recorded",
        "published": "",
        "baseline": "",
        "measured": "",
        "command": f"expertmesh simulate claims --only {claim} --trace FILE.npz",
        "verdict": "skipped",
        "why": "no recorded routing was given: --trace FILE.npz",
        "figures": {},
    }
