"""`expertmesh bench storm`: random cancellations, disconnects and malformed requests, by the thousand.

The cluster is a real one on this machine, all over real sockets. It must answer each request by its own
merits, give back all that it held, serve undisturbed requests the same tokens throughout, log no error of
its own, and not grow. Exits 1 when it does not.
"""

import asyncio
import re
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any
from urllib.parse import urlsplit

from rich.console import Console
from rich.table import Table

from cluster.config import ServeConfig
from cluster.server.client import Client
from deploy.bench.process_use import ClusterProcesses
from deploy.bench.storm.kinds import Target
from deploy.bench.storm.run import Outcome, storm
from deploy.cluster import RunningCluster, running_cluster
from deploy.exit_code import exit_code_of
from deploy.json_file import write_json
from deploy.local_ray import local_ray
from deploy.serve import cpus_for
from deploy.settings import load_config

SAMPLE_S = 2.0
MAX_GROWTH = 0.03
"""Of resident memory, from the second fifth of the storm to the last."""
_OPTIONS = ("server.port=0", "server.http_port=0", "scheduler.max_num_queued_reqs=1024")
_ERRORS = re.compile(r"Traceback|our own|internal error|\bERROR\b", re.IGNORECASE)


def storm_command(
    path: Path | None,
    overrides: Sequence[str],
    num_requests: int,
    concurrency: int,
    seed: int,
    limit_s: float,
    json_file: Path | None,
) -> int:
    complaints: dict[str, int] = {}

    def run() -> None:
        config = load_config(path, [*_OPTIONS, *overrides])
        report = _run(Console(), config, num_requests, concurrency, seed, limit_s)
        write_json(json_file, report)
        complaints.update(report["complaints"])

    code = exit_code_of(run, interrupted=130)
    return code or int(bool(complaints))


def _run(
    console: Console,
    config: ServeConfig,
    num_requests: int,
    concurrency: int,
    seed: int,
    limit_s: float,
) -> dict[str, Any]:
    parallel = config.parallel
    layout = f"{parallel.num_nodes}x{parallel.ranks_per_node}"
    with console.status(f"starting {layout} ...") as status, local_ray(cpus_for(config)) as ray_dir:
        with running_cluster(config) as cluster:
            memory = _Memory()

            def on_progress(outcome: Outcome) -> None:
                memory.sample()
                status.update(
                    f"{outcome.num_requests:,} of {num_requests:,} requests, "
                    f"{outcome.num_sentinels} undisturbed ones, {len(outcome.complaints)} complaints"
                )

            target = _target(cluster)
            outcome = asyncio.run(
                storm(target, num_requests, concurrency, seed, on_progress, limit_s)
            )
            memory.sample(now=True)
        errors = _logged_errors(ray_dir)
    outcome.complaints.update(memory.complaints())
    outcome.complaints.update({f"log: {line}": n for line, n in errors.items()})
    _print(console, outcome, memory)
    return {
        "layout": layout,
        "requests": outcome.num_requests,
        "seconds": outcome.seconds,
        "ended": {kind: dict(ended) for kind, ended in outcome.ended.items()},
        "undisturbed_requests": outcome.num_sentinels,
        "settled_s": outcome.settled_s,
        "rss_mib": memory.samples,
        "complaints": dict(outcome.complaints),
    }


def _target(cluster: RunningCluster) -> Target:
    http = urlsplit(cluster.http_url or "")
    with Client(cluster.endpoint) as client:
        vocab_size = client.model_info().vocab_size
    where = (http.hostname, http.port) if http.hostname and http.port else None
    return Target(cluster.endpoint, where, vocab_size)


class _Memory:
    """Resident memory of controller and ranks over time: [seconds, MiB, MiB]."""

    def __init__(self) -> None:
        self._processes = ClusterProcesses()
        self._begun = time.monotonic()
        self.samples: list[dict[str, float]] = []

    def sample(self, *, now: bool = False) -> None:
        seconds = time.monotonic() - self._begun
        if now or not self.samples or seconds - self.samples[-1]["s"] >= SAMPLE_S:
            use = self._processes.use()
            mib = {name: of_kind.rss_bytes / 2**20 for name, of_kind in use.items()}
            self.samples.append({"s": seconds, **mib})

    def between(self, kind: str, first: float, last: float) -> float:
        """Mean over a part of the storm, given as shares of it."""
        count = len(self.samples)
        part = self.samples[int(first * count) : max(int(last * count), int(first * count) + 1)]
        return fmean(sample[kind] for sample in part or self.samples)

    def complaints(self) -> Counter[str]:
        found: Counter[str] = Counter()
        for kind in self.samples[0].keys() - {"s"}:
            early, late = self.between(kind, 0.2, 0.4), self.between(kind, 0.8, 1.0)
            if late > early * (1 + MAX_GROWTH):
                found[f"{kind} grew from {early:.0f} to {late:.0f} MiB"] += 1
        return found


def _logged_errors(ray_dir: Path) -> Counter[str]:
    """Lines of the processes' own logs that tell of an error of ours."""
    found: Counter[str] = Counter()
    for file in ray_dir.glob("session_latest/logs/worker-*"):
        for line in file.read_text(errors="replace").splitlines():
            if _ERRORS.search(line):
                found[re.sub(r"\d+", "N", line)[:200]] += 1
    return found


def _print(console: Console, outcome: Outcome, memory: _Memory) -> None:
    table = Table("what clients did", "requests", "how it ended")
    for kind, ended in sorted(outcome.ended.items()):
        counts = ", ".join(f"{name} {count:,}" for name, count in ended.most_common(6))
        table.add_row(kind, f"{sum(ended.values()):,}", counts)
    console.print(table)
    rate = outcome.num_requests / outcome.seconds
    console.print(
        f"{outcome.num_requests:,} requests in {outcome.seconds:.0f} s ({rate:.0f}/s); "
        f"{outcome.num_sentinels} undisturbed ones got their tokens"
    )
    if outcome.settled_s is not None:
        console.print(f"all KV blocks were back {outcome.settled_s:.1f} s after the last")
    for kind in memory.samples[0].keys() - {"s"}:
        early, late = memory.between(kind, 0.2, 0.4), memory.between(kind, 0.8, 1.0)
        console.print(f"resident memory of {kind}: {early:.0f} MiB, at the end {late:.0f} MiB")
    for text, count in outcome.complaints.most_common(20):
        console.print(f"{count} x {text}", style="red", markup=False, highlight=False)
