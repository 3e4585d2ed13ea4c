"""Balance, ours and EPLB's: the sections of `expertmesh bench balance`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from simulations.bench import (
    balance_drift,
    balance_planned,
    balance_real,
    balance_sends,
    balance_served,
)
from simulations.workload import NUM_LAYERS

SECTIONS = ("planned", "served", "real", "drift", "sends")
NEED_TRACE = ("real", "sends")


def run(
    sections: Sequence[str] = (),
    trace: Path | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """What `expertmesh bench balance` writes as JSON. The sections' functions say what keys mean.

    planned.<config>.<workload>.{ours,eplb,difference}   and seconds.{plan,split}
    served.<jitter>.{mean,p99}
    real.<regime>.{mean,p99}
    drift.<rho>.{bytes_ratio,imbalance}
    sends.{per_token,naive,imbalance}
    skipped: sections that were left out for want of a trace, if none was named

    Raises ValueError for unknown sections, sections without the trace they need, and bad traces.
    """
    unknown = sorted(set(sections) - set(SECTIONS))
    if unknown:
        raise ValueError(f"no section {', '.join(unknown)}: choose from {', '.join(SECTIONS)}")
    lacking = [name for name in sections if name in NEED_TRACE and trace is None]
    if lacking:
        raise ValueError(f"section {lacking[0]} needs recorded routing: add --trace FILE.npz")
    report: dict[str, Any] = {}
    if not sections and trace is None:
        report["skipped"] = list(NEED_TRACE)
    for name in sections or SECTIONS:
        if name == "planned":
            report["planned"] = balance_planned.planned(NUM_LAYERS, progress)
            report["seconds"] = balance_planned.seconds(progress)
        elif name == "served":
            report["served"] = balance_served.served(progress)
        elif name == "drift":
            report["drift"] = balance_drift.drift(progress)
        elif name == "real" and trace is not None:
            report["real"] = balance_real.real(trace, progress)
        elif name == "sends" and trace is not None:
            report["sends"] = balance_sends.sends(trace, progress)
    return report
