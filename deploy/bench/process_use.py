"""What the processes of a cluster on this machine use: processor time and memory, read from outside."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass

import psutil

CONTROLLER, RANK = "ray::Controller", "ray::Worker"


@dataclass(frozen=True)
class Use:
    """Sums over processes of one kind. `cpu_s` since they began; resident memory now."""

    cpu_s: float
    rss_bytes: int


class ClusterProcesses:
    """The controller and the ranks below this process; empty where the cluster is elsewhere."""

    def __init__(self) -> None:
        ours = psutil.Process().children(recursive=True)
        self._of_kind = {
            kind: [process for process in ours if _title(process).startswith(kind)]
            for kind in (CONTROLLER, RANK)
        }

    def use(self) -> dict[str, Use]:
        """{"controller", "ranks"}: of those processes that there are."""
        return {
            name: _sum(self._of_kind[kind])
            for name, kind in (("controller", CONTROLLER), ("ranks", RANK))
            if self._of_kind[kind]
        }


def _sum(processes: list[psutil.Process]) -> Use:
    cpu_s, rss_bytes = 0.0, 0
    for process in processes:
        with suppress(psutil.Error):
            times = process.cpu_times()
            cpu_s += times.user + times.system
            rss_bytes += process.memory_info().rss
    return Use(cpu_s, rss_bytes)


def _title(process: psutil.Process) -> str:
    with suppress(psutil.Error):
        return " ".join(process.cmdline()[:1])
    return ""
