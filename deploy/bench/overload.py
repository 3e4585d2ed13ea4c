"""`expertmesh bench overload`: ten times more requests than a cluster can serve, for minutes.

    capacity    users of a closed loop, as many as may run at once: the peak, and the SLO it keeps
    overload    an open loop of ten times as many requests a second, on the same cluster
    quiet       the first requests of that load again, few at a time: their tokens must be the same

What must hold: requests within the SLO nearly as fast as at the peak; refusals at once; memory flat; one
end for each request; nothing left behind. The generator shares the machine with the server, niced and in
a process of its own; what it takes is part of the report.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from cluster.config import ServeConfig
from cluster.server.client import Client
from deploy.bench.process_use import ClusterProcesses, Use
from deploy.cluster import running_cluster
from deploy.exit_code import exit_code_of
from deploy.json_file import write_json
from deploy.local_ray import local_ray
from deploy.serve import cpus_for
from deploy.settings import load_config
from simulations.bench.load_process import LoadProcess, Progress, Sent
from simulations.bench.serving_load import Load
from simulations.bench.serving_outcomes import Outcome, Slo, summary
from simulations.serving.arrivals import Lengths

FACTOR = 10.0
QUEUED_SHARE = 0.25
"""Requests that may wait, of those that may run: a short queue is what keeps the TTFT of the admitted."""
SLO_MARGIN = 1.5
SAMPLE_S = 1.0
IDLE_S = 60.0
QUIET_USERS = 4


@dataclass(frozen=True)
class OverloadBench:
    """What to do. `slo` None: what the peak keeps, 99 of 100 times, and half as much again."""

    minutes: float = 3.0
    users: int = 64
    prompt: Lengths = field(default_factory=lambda: Lengths(mean=32))
    output: Lengths = field(default_factory=lambda: Lengths(mean=128))
    slo: Slo | None = None
    factor: float = FACTOR
    keep_tokens: int = 48
    seed: int = 0
    overrides: Sequence[str] = ()
    config: Path | None = None


class Memory:
    """Resident bytes of the controller and of all ranks, sampled while the context lasts."""

    def __init__(self, processes: ClusterProcesses) -> None:
        self.samples: list[tuple[float, dict[str, Use]]] = []
        self._processes = processes
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def _sample(self) -> None:
        start = time.monotonic()
        while True:
            self.samples.append((time.monotonic() - start, self._processes.use()))
            if self._done.wait(SAMPLE_S):
                return

    def __enter__(self) -> Memory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def report(self) -> dict[str, dict[str, float]]:
        """MiB at the beginning, at the end and at most, and MiB a minute of the second half."""
        report = {}
        for name in self.samples[0][1]:
            times = np.array([at_s for at_s, _ in self.samples])
            mib = np.array([use[name].rss_bytes for _, use in self.samples]) / 2**20
            later = times >= times[-1] / 2
            slope = np.polyfit(times[later], mib[later], 1)[0] if later.sum() > 2 else 0.0
            report[name] = {
                "first_mib": float(mib[0]),
                "last_mib": float(mib[-1]),
                "max_mib": float(mib.max()),
                "slope_mib_per_minute": 60 * float(slope),
            }
        return report


def overload_command(bench: OverloadBench, json_file: Path | None) -> int:
    """Measure, show, write; 1 if a request was lost, its tokens differ, or blocks were left in use."""
    report: dict[str, Any] = {}
    console = Console()

    def measure() -> None:
        config = overload_config(bench)
        with console.status("starting ...") as status:
            report.update(_measure(config, bench, status.update))
        show(console, report)
        write_json(json_file, report)

    code = exit_code_of(measure, interrupted=130)
    return code or int(not all(report["correct"].values()))


def overload_config(bench: OverloadBench) -> ServeConfig:
    """Room for `users` to run at once and for a quarter as many to wait. Raises ConfigError."""
    parallel = load_config(bench.config, bench.overrides).parallel
    running = -(-bench.users // parallel.num_replicas)
    longest = Load(
        num_requests=1, concurrency=1, prompt=bench.prompt, output=bench.output
    ).longest  # fmt: skip
    room = (
        f"scheduler.max_num_seqs={running}",
        f"scheduler.max_num_batched_tokens={max(512, running)}",
        f"scheduler.max_num_queued_reqs={bench.users + max(1, int(QUEUED_SHARE * bench.users))}",
        f"cache.num_blocks={max(256, running * (longest // 32 + 2))}",
        "cache.block_size=32",
    )
    return load_config(bench.config, [*room, *bench.overrides])


def _measure(
    config: ServeConfig, bench: OverloadBench, show_status: Callable[[str], None]
) -> dict[str, Any]:
    show_status(f"starting {config.parallel.num_nodes}x{config.parallel.ranks_per_node} ...")
    with (
        local_ray(cpus_for(config)),
        running_cluster(config) as cluster,
        LoadProcess(cluster.endpoint) as generator,
    ):
        users = config.scheduler.max_num_queued_reqs
        closed = Load(
            num_requests=3 * users, concurrency=users, prompt=bench.prompt, output=bench.output,
            seed=bench.seed + 1,
        )  # fmt: skip
        generator.run(replace(closed, num_requests=users, output=Lengths(mean=8)))  # warms up
        peak, _ = _sent(generator, closed, "capacity", show_status)
        slo = bench.slo or _slo_of(peak)
        at_peak = summary(_steady(peak), _steady_seconds(peak), slo)
        rate = bench.factor * at_peak["requests_per_s"]
        flood = Load(
            num_requests=max(users, int(60 * bench.minutes * rate)), rate=rate,
            prompt=bench.prompt, output=bench.output, keep_tokens=bench.keep_tokens,
            seed=bench.seed + 2,
        )  # fmt: skip
        overload, use = _sent(generator, flood, f"{bench.factor:g}x overload", show_status)
        idle = _wait_until_idle(cluster.endpoint)
        quiet, _ = _sent(
            generator, replace(flood, rate=None, concurrency=QUIET_USERS), "quiet", show_status,
            first=bench.keep_tokens,
        )  # fmt: skip
        idle_again = _wait_until_idle(cluster.endpoint)
    return report_of(bench, slo, at_peak, rate, overload, quiet, use, [idle, idle_again])


def _sent(
    generator: LoadProcess,
    load: Load,
    what: str,
    show_status: Callable[[str], None],
    first: int | None = None,
) -> tuple[Sent, dict[str, Any]]:
    """A load, and what the server used meanwhile. Raises KeyboardInterrupt after Ctrl-C."""

    def show_progress(progress: Progress) -> None:
        total = first or load.num_requests
        show_status(f"{what}: {progress.num_ended:,} of {total:,} requests have ended")

    processes = ClusterProcesses()
    with Memory(processes) as memory:
        sent = generator.run(load, show_progress, first=first)
    if sent.interrupted:
        raise KeyboardInterrupt
    before, after = memory.samples[0][1], processes.use()
    cpu = {name: (after[name].cpu_s - before[name].cpu_s) / sent.seconds for name in after}
    return sent, {
        "memory": memory.report(),
        "cpu_share": {**cpu, "generator": sent.cpu_s / sent.seconds},
    }


def _slo_of(peak: Sent) -> Slo:
    figures = summary(_steady(peak), 1.0, Slo())
    return Slo(*(SLO_MARGIN * figures[key]["p99"] for key in ("ttft_ms", "tpot_ms")))


def _steady(sent: Sent) -> list[Outcome]:
    """Requests that ended while others were still to be sent: a closed loop ends with fewer users."""
    return [o for o in sent.outcomes if o.sent_s + o.end_s <= _steady_seconds(sent)]


def _steady_seconds(sent: Sent) -> float:
    return max(outcome.sent_s for outcome in sent.outcomes) or sent.seconds


def _wait_until_idle(endpoint: str) -> dict[str, int]:
    """What replicas hold once they hold nothing, or after a minute."""
    deadline = time.monotonic() + IDLE_S
    with Client(endpoint) as client:
        while True:
            replicas = client.loads().replicas
            held = {
                name: sum(getattr(replica, name) for replica in replicas)
                for name in ("in_flight", "running", "waiting", "kv_blocks_used")
            }
            if not any(held.values()) or time.monotonic() > deadline:
                return held
            time.sleep(0.2)


# The report ---------------------------------------------------------------------------------------


def report_of(
    bench: OverloadBench,
    slo: Slo,
    at_peak: dict[str, Any],
    rate: float,
    overload: Sent,
    quiet: Sent,
    use: dict[str, Any],
    idle: Sequence[dict[str, int]],
) -> dict[str, Any]:
    """The JSON. Goodput under overload is of the time in which requests came."""
    figures = summary(overload.outcomes, _steady_seconds(overload), slo)
    peak_goodput = at_peak["goodput"]["tokens_per_s"]
    compared, differing = _compare(overload, quiet)
    return {
        "factor": bench.factor,
        "offered_requests_per_s": rate,
        "minutes": _steady_seconds(overload) / 60,
        "slo": asdict(slo),
        "peak": at_peak,
        "overload": figures,
        "goodput_of_peak": figures["goodput"]["tokens_per_s"] / max(peak_goodput, 1e-9),
        "rejection_ms": figures["rejection_ms"],
        **use,
        "compared_with_quiet": compared,
        "correct": {
            "every request has one end": all(o.num_ends == 1 for o in overload.outcomes),
            "every answer is complete": all(
                o.num_tokens == o.planned_tokens for o in overload.outcomes if o.ok
            ),
            "none failed": figures["requests"]["failed"] == 0,
            "same tokens as when quiet": compared > 0 and not differing,
            "idle afterwards": not any(any(held.values()) for held in idle),
        },
        "held_afterwards": idle[-1],
        "machine": {
            "processors": len(os.sched_getaffinity(0)),
            "load_average": os.getloadavg()[0],
        },
    }


def _compare(overload: Sent, quiet: Sent) -> tuple[int, list[int]]:
    """How many answers both have, and which of them differ."""
    expected = {o.idx: o.token_ids for o in quiet.outcomes if o.ok}
    kept = [o for o in overload.outcomes if o.ok and o.token_ids and o.idx in expected]
    return len(kept), [o.idx for o in kept if o.token_ids != expected[o.idx]]


def show(console: Console, report: dict[str, Any]) -> None:
    table = Table("", "peak", f"{report['factor']:g}x overload")
    for name, row in _rows(report["peak"], report["overload"]):
        table.add_row(name, *row)
    console.print(table)
    rejected = report["rejection_ms"]
    if rejected["p50"] is not None:
        print(f"refused within {rejected['p50']:.1f} ms (p50), {rejected['p99']:.1f} ms (p99)")
    print(f"goodput {report['goodput_of_peak']:.1%} of the peak's")
    for name, memory in report["memory"].items():
        print(
            f"memory of the {name}: {memory['first_mib']:,.0f} MiB to {memory['last_mib']:,.0f} "
            f"MiB, {memory['slope_mib_per_minute']:+.2f} MiB a minute"
        )
    shares = ", ".join(f"{name} {share:.0%}" for name, share in report["cpu_share"].items())
    print(f"processor time of one core: {shares}")
    for name, holds in report["correct"].items():
        print(f"{name}: {'yes' if holds else 'NO'}")


def _rows(peak: dict[str, Any], overload: dict[str, Any]) -> Iterator[tuple[str, list[str]]]:
    sides = (peak, overload)
    for name in ("ok", "rejected", "failed"):
        yield name, [f"{side['requests'][name]:,}" for side in sides]
    yield "tokens/s", [f"{side['throughput_tokens_per_s']:,.0f}" for side in sides]
    yield "within SLO, tokens/s", [f"{side['goodput']['tokens_per_s']:,.0f}" for side in sides]
    for name, key in (("TTFT p99, ms", "ttft_ms"), ("TPOT p99, ms", "tpot_ms")):
        yield name, [_figure(side[key]["p99"]) for side in sides]


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"
