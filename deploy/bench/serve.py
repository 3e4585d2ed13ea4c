"""`expertmesh bench serve`: what clients of a real server get, over gRPC.

    own cluster    rounds of [one request at a time, the load], on the configured layout
    then on 1x1    rounds of [transformers, ours] with 1 sequence and with 16, on the same processors
    --endpoint     the same load on a server that runs

Sides take turns within one run, because machines are noisy, and the median of rounds counts. Ctrl-C ends
the measurement and keeps what it has.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from cluster.config import ServeConfig
from deploy.bench import transformers_speed
from deploy.bench.process_use import ClusterProcesses
from deploy.bench.transformers_speed import Batch, TransformersProcess
from deploy.cluster import running_cluster
from deploy.exit_code import exit_code_of
from deploy.json_file import write_json
from deploy.local_ray import local_ray
from deploy.serve import cpus_for
from deploy.settings import load_config
from simulations.bench.load_process import LoadProcess, Progress, Sent
from simulations.bench.serving_load import Load
from simulations.bench.serving_outcomes import Slo, summary
from simulations.serving.arrivals import Lengths

BATCHES = (1, 16)
ONE_AT_A_TIME_REQUESTS = 4
WARM_UP_TOKENS = 8
SPARE_BLOCKS = 1.1


@dataclass(frozen=True)
class ServeBench:
    """What to measure. `compare`: also one at a time, and transformers."""

    load: Load
    slo: Slo
    rounds: int = 3
    compare: bool = True
    endpoint: str | None = None
    overrides: Sequence[str] = ()
    config: Path | None = None


@dataclass
class Findings:
    """What has been measured so far. Rates by side are one number a round."""

    loads: list[Sent] = field(default_factory=list)
    one_at_a_time: list[float] = field(default_factory=list)
    many: list[float] = field(default_factory=list)
    transformers: dict[int, list[float]] = field(default_factory=lambda: {b: [] for b in BATCHES})
    ours: dict[int, list[float]] = field(default_factory=lambda: {b: [] for b in BATCHES})
    threads: dict[int, int] = field(default_factory=dict)
    not_compared: str | None = None
    layout: str | None = None
    server_cpu_s: dict[str, float] = field(default_factory=dict)
    interrupted: bool = False


class InterruptedLoadError(Exception):
    """Ctrl-C during a load: its results are kept, nothing more is measured."""


def load_of(
    *, prompt: str, output: str, requests: int | None, concurrency: int, rate: float | None,
    **rest: Any,
) -> Load:  # fmt: skip
    """A load as the command line says it. Raises ValueError."""
    return Load(
        num_requests=requests or 3 * concurrency,
        concurrency=None if rate else concurrency,
        rate=rate,
        prompt=Lengths.parse(prompt),
        output=Lengths.parse(output),
        **rest,
    )


def serve_command(load: dict[str, Any], slo: Slo, json_file: Path | None, **rest: Any) -> int:
    """Measure, show, write; 130 after Ctrl-C, 2 for a load that cannot be, else as `deploy.exit_code`.

    `load` has the arguments of `load_of`, `rest` the other fields of ServeBench.
    """
    console = Console()
    found = Findings()
    try:
        bench = ServeBench(load=load_of(**load), slo=slo, **rest)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2

    def measure() -> None:
        try:
            _measure(console, bench, found)
        except InterruptedLoadError:
            pass
        except KeyboardInterrupt:
            found.interrupted = True
        if found.loads:
            report = report_of(bench, found)
            show(console, report)
            write_json(json_file, report)

    code = exit_code_of(measure, interrupted=130)
    return 130 if found.interrupted else code


def _measure(console: Console, bench: ServeBench, found: Findings) -> None:
    with console.status("") as status:
        if bench.endpoint is not None:
            found.not_compared = "it was not our own cluster that was measured (--endpoint)"
            with LoadProcess(bench.endpoint) as generator:
                _rounds(Side(generator, status.update), bench, found)
            return
        config = config_for(bench.load, bench.config, bench.overrides)
        found.layout = _layout(config)
        with cluster_side(config, status.update) as side:
            _rounds(side, bench, found)
        found.not_compared = transformers_speed.missing() if bench.compare else "not asked for"
        if found.not_compared is None:
            alone = config_for(bench.load, bench.config, [*bench.overrides, *ONE_RANK])
            with cluster_side(alone, status.update) as side:
                _against_transformers(side, alone, bench, found)


ONE_RANK = ("parallel.num_nodes=1", "parallel.ranks_per_node=1")


class Side:
    """A server and the generator that sends it loads."""

    def __init__(self, generator: LoadProcess, show: Any) -> None:
        self._generator = generator
        self.show = show

    def send(self, load: Load, found: Findings, what: str) -> Sent:
        """Raises InterruptedLoadError if Ctrl-C ended it."""
        sent = self._generator.run(load, lambda progress: self.show(_doing(what, load, progress)))
        found.interrupted |= sent.interrupted
        return sent


@contextmanager
def cluster_side(config: ServeConfig, show: Any) -> Iterator[Side]:
    """A cluster of our own, warm."""
    show(f"starting {_layout(config)} ...")
    with (
        local_ray(cpus_for(config)),
        running_cluster(config) as cluster,
        LoadProcess(cluster.endpoint) as generator,
    ):
        yield Side(generator, show)


def _rounds(side: Side, bench: ServeBench, found: Findings) -> None:
    load = bench.load
    _warm_up(side, load, found)
    alone = replace(load, concurrency=1, rate=None, num_requests=ONE_AT_A_TIME_REQUESTS)
    for number in range(bench.rounds):
        of = f"round {number + 1} of {bench.rounds}"
        if bench.compare:
            sent = side.send(replace(alone, seed=load.seed + number), found, f"{of}, one at a time")
            _stop_if_interrupted(found)
            found.one_at_a_time.append(_tokens_per_s(sent))
        processes = ClusterProcesses()
        before = processes.use()
        sent = side.send(replace(load, seed=load.seed + 1000 * (number + 1)), found, of)
        found.loads.append(sent)
        for name, use in processes.use().items():
            spent_s = use.cpu_s - before[name].cpu_s
            found.server_cpu_s[name] = found.server_cpu_s.get(name, 0.0) + spent_s
        _stop_if_interrupted(found)
        found.many.append(_tokens_per_s(sent))


def _warm_up(side: Side, load: Load, found: Findings) -> None:
    users = load.concurrency or 16
    side.send(
        replace(
            load, num_requests=users, concurrency=users, rate=None,
            output=Lengths(mean=WARM_UP_TOKENS), seed=load.seed + 999_999,
        ),
        found,
        "warming up",
    )  # fmt: skip
    _stop_if_interrupted(found)


def _against_transformers(
    side: Side, config: ServeConfig, bench: ServeBench, found: Findings
) -> None:
    """The same prompts' lengths, the same number of sequences at once, in turns."""
    prompt, output = round(bench.load.prompt.mean), round(bench.load.output.mean)
    _warm_up(side, replace(bench.load, concurrency=max(BATCHES), rate=None), found)
    with TransformersProcess(config.model, config.dtype) as transformers:
        for size in BATCHES:
            side.show(f"transformers, batch {size}: which number of threads is fastest")
            batch = Batch(size, prompt, output)
            speeds = {
                n: transformers.tokens_per_s(batch, n) for n in transformers_speed.thread_counts()
            }
            found.threads[size] = max(speeds, key=lambda n: speeds[n])
        for number in range(bench.rounds):
            for size in BATCHES:
                what = f"round {number + 1} of {bench.rounds}, batch {size} on 1x1"
                side.show(f"{what}: transformers")
                batch = Batch(size, prompt, output)
                speed = transformers.tokens_per_s(batch, found.threads[size])
                found.transformers[size].append(speed)
                load = Load(
                    num_requests=size if size > 1 else 2,
                    concurrency=size,
                    prompt=Lengths(mean=prompt),
                    output=Lengths(mean=output),
                    seed=bench.load.seed + number,
                )
                sent = side.send(load, found, f"{what}: ours")
                _stop_if_interrupted(found)
                found.ours[size].append(_tokens_per_s(sent))


def config_for(load: Load, path: Path | None, overrides: Sequence[str]) -> ServeConfig:
    """Room for all users of the load at once; what the user says stands. Raises ConfigError."""
    parallel = load_config(path, overrides).parallel
    users = load.concurrency or 256
    num_seqs = max(16, -(-users // parallel.num_replicas))
    tokens = num_seqs * (load.longest + 32)
    room = (
        f"scheduler.max_num_seqs={num_seqs}",
        f"scheduler.max_num_batched_tokens={max(512, num_seqs)}",
        f"scheduler.max_num_queued_reqs={max(256, users)}",
        f"cache.num_blocks={max(256, int(SPARE_BLOCKS * tokens / 32))}",
        "cache.block_size=32",
    )
    return load_config(path, [*room, *overrides])


def _stop_if_interrupted(found: Findings) -> None:
    if found.interrupted:
        raise InterruptedLoadError


def _tokens_per_s(sent: Sent) -> float:
    return sum(outcome.num_tokens for outcome in sent.outcomes if outcome.ok) / sent.seconds


def _layout(config: ServeConfig) -> str:
    return f"{config.parallel.num_nodes}x{config.parallel.ranks_per_node}"


def _doing(what: str, load: Load, progress: Progress) -> str:
    rate = progress.num_tokens / max(progress.seconds, 1e-9)
    return (
        f"{what}: {progress.num_ended} of {load.num_requests} requests, "
        f"{progress.num_sent - progress.num_ended} under way, {rate:,.0f} tokens/s"
    )


# The report ---------------------------------------------------------------------------------------


def report_of(bench: ServeBench, found: Findings) -> dict[str, Any]:
    """The JSON. Rates are medians of rounds; percentiles are over all rounds' requests."""
    outcomes = [outcome for sent in found.loads for outcome in sent.outcomes]
    seconds = sum(sent.seconds for sent in found.loads)
    figures = summary(outcomes, seconds, bench.slo)
    pairs = list(zip(found.many, found.one_at_a_time, strict=False))
    return {
        "layout": found.layout,
        "endpoint": bench.endpoint,
        "load": {name: value for name, value in asdict(bench.load).items() if value is not None},
        "slo": asdict(bench.slo),
        **figures,
        "throughput_tokens_per_s": _median(found.many) or figures["throughput_tokens_per_s"],
        "one_at_a_time_tokens_per_s": _median(found.one_at_a_time),
        "continuous_batching_ratio": _median([many / one for many, one in pairs]),
        "transformers": _comparison(found),
        "rounds": {"throughput": found.many, "one_at_a_time": found.one_at_a_time},
        "cpu_share": {
            "generator": sum(sent.cpu_s for sent in found.loads) / seconds,
            **{name: cpu_s / seconds for name, cpu_s in found.server_cpu_s.items()},
        },
        "controller_ms_per_token": (
            1e3 * found.server_cpu_s["controller"] / max(1, figures["completion_tokens"])
            if "controller" in found.server_cpu_s
            else None
        ),
        "machine": {
            "processors": len(os.sched_getaffinity(0)),
            "load_average": os.getloadavg()[0],
        },
        "interrupted": found.interrupted,
    }


def _comparison(found: Findings) -> dict[str, Any]:
    report: dict[str, Any] = {"reason": found.not_compared}
    ours, ratios = {}, {}
    for size in BATCHES:
        key = f"batch_{size}"
        report[key] = _median(found.transformers[size])
        ours[key] = _median(found.ours[size])
        pairs = zip(found.ours[size], found.transformers[size], strict=False)
        ratios[key] = _median([mine / theirs for mine, theirs in pairs])
    threads = {f"batch_{size}": number for size, number in found.threads.items()}
    return {**report, "ours_1x1": ours, "ratio": ratios, "threads": threads}


def _median(values: Sequence[float]) -> float | None:
    return median(values) if values else None


def show(console: Console, report: dict[str, Any]) -> None:
    """Tables that fit 80 columns."""
    table = Table("ms", "mean", "p50", "p95", "p99", "max")
    for name, key in (
        ("TTFT", "ttft_ms"), ("TPOT", "tpot_ms"), ("ITL", "itl_ms"), ("E2E", "e2e_ms"),
        ("rejection", "rejection_ms"),
    ):  # fmt: skip
        if report[key]["mean"] is not None:
            table.add_row(name, *(f"{report[key][p]:,.1f}" for p in report[key]))
    console.print(table)
    counts = report["requests"]
    print(
        f"{counts['ok']} requests ok, {counts['rejected']} rejected, {counts['failed']} failed; "
        f"{report['throughput_tokens_per_s']:,.0f} tokens/s"
    )
    if any(limit is not None for limit in report["slo"].values()):
        good = report["goodput"]
        print(
            f"goodput: {good['requests_per_s']:.2f} requests/s, {good['tokens_per_s']:,.0f} "
            f"tokens/s, {good['share']:.0%} of requests within the SLO"
        )
    if report["one_at_a_time_tokens_per_s"]:
        print(
            f"one at a time {report['one_at_a_time_tokens_per_s']:,.0f} tokens/s: "
            f"batching gives {report['continuous_batching_ratio']:.1f}x"
        )
    _show_comparison(console, report["transformers"])
    if report["cached_tokens"]:
        print(f"{report['prefix_hit_rate']:.0%} of prompt tokens were found in the cache")
    if report["errors"]:
        for code, message in report["error_examples"].items():
            print(f"{report['errors'][code]} x {code}: {message:.200}")
    shares = ", ".join(f"{name} {share:.0%}" for name, share in report["cpu_share"].items())
    print(f"processor time of one core: {shares}")


def _show_comparison(console: Console, comparison: dict[str, Any]) -> None:
    if comparison["ratio"]["batch_1"] is None:
        return
    table = Table("1x1, tokens/s", "ours", "transformers", "threads", "ratio")
    for key, ratio in comparison["ratio"].items():
        if ratio is not None:
            table.add_row(
                key.replace("_", " "),
                f"{comparison['ours_1x1'][key]:,.0f}",
                f"{comparison[key]:,.0f}",
                str(comparison["threads"][key]),
                f"{ratio:.2f}x",
            )
    console.print(table)
