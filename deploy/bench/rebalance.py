"""`expertmesh bench rebalance`: the traffic changes its subject, experts move, and nobody notices.

The same requests are served twice by a real cluster, at constant concurrency: English, then Chinese,
then Python. Once every expert stays where it was loaded; once the rebalancer is on. Both runs must
give the same tokens, and steps as long; what differs is how evenly the ranks are loaded.

L expert layers, R ranks.
"""

import asyncio
import itertools
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from cluster.config import ServeConfig
from cluster.server.client import AsyncClient, ClientError
from deploy.bench.picture import PictureError, check_pictures, draw_balance
from deploy.cluster import RunningCluster, running_cluster
from deploy.exit_code import exit_code_of
from deploy.json_file import write_json
from deploy.local_ray import local_ray
from deploy.models.domain_prompts import DOMAIN_PROMPTS
from deploy.serve import cpus_for
from deploy.settings import load_config

SAMPLE_S = 0.5
PAIRS = 2_000
LATE = 1.1  # of the static run's 99th percentile: a step that somebody could notice
LAYOUT = (
    "experts.num_redundant_experts=16",
    "eplb_config.interval_s=0.5",
    # mosaic's experts have 96 KiB: at this rate each is under way as long as one of DeepSeek-V3 at 64.
    "eplb_config.bandwidth_mib_s=0.5",
)


@dataclass(frozen=True)
class Load:
    """How many requests of each domain, how many at once, and how long their answers are."""

    requests: int = 64
    concurrency: int = 16
    max_tokens: int = 48


@dataclass
class Run:
    """What one cluster did. `samples`: seconds since the start, domain, and pairs served so far [R, L]."""

    tokens: dict[str, list[int]] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)
    samples: list[tuple[float, str, NDArray[np.int64]]] = field(default_factory=list)
    step_s: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    """Seconds of every step."""
    moving: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, dtype=bool))
    """Whether experts were on their way to any rank in that step."""
    migration: dict[str, Any] = field(default_factory=dict)

    def balancedness(self) -> Iterator[tuple[float, str, float]]:
        """In windows of PAIRS pairs: thousands of pairs so far, the domain, mean over layers of mean /
        max over ranks. Smaller windows would show how tokens happen to fall, not how ranks are loaded."""
        _, _, before = self.samples[0]
        for _, domain, after in self.samples[1:]:
            if (after - before)[:, 0].sum() >= PAIRS:
                yield after[:, 0].sum() / 1e3, domain, balancedness(after - before)
                before = after

    def of_domain(self, domain: str) -> tuple[float, float]:
        """Balancedness of the first third of a domain's tokens, and of the last."""
        mine = [served for _, name, served in self.samples if name == domain]
        third = max(1, len(mine) // 3)
        return balancedness(mine[third] - mine[0]), balancedness(mine[-1] - mine[-1 - third])


def balancedness(served_RL: NDArray[np.int64]) -> float:
    """Mean over layers of mean / max over ranks."""
    return float((served_RL.mean(axis=0) / served_RL.max(axis=0)).mean())


def rebalance_command(
    overrides: list[str], load: Load, picture: Path | None, json_file: Path | None
) -> int:
    """Run both clusters, show the comparison; 1 if a request was lost or a token differs."""
    report: dict[str, Any] = {}

    def measure() -> None:
        console = Console()
        report.update(_compare(console, overrides, load, picture))
        _show(console, report)
        write_json(json_file, report)

    try:
        check_pictures(picture)
    except PictureError as error:
        print(error, file=sys.stderr)
        return 2
    code = exit_code_of(measure, interrupted=130)
    return code or int(bool(report["lost_requests"]) or not report["same_tokens"])


def _compare(
    console: Console, overrides: list[str], load: Load, picture: Path | None
) -> dict[str, Any]:
    runs = {}
    for name, enabled in (("static", "false"), ("rebalanced", "true")):
        config = load_config(None, [*LAYOUT, *overrides, f"eplb_config.enabled={enabled}"])
        console.print(
            f"{name}: {load.requests} requests of each of {', '.join(DOMAIN_PROMPTS)} ..."
        )
        runs[name] = _serve(config, load)
    static, moving = runs["static"], runs["rebalanced"]
    if picture is not None:
        draw_balance(picture, {name: list(run.balancedness()) for name, run in runs.items()})
        console.print(f"wrote {picture}")
    limit_s = LATE * float(np.percentile(static.step_s, 99))
    return {
        "domains": {
            domain: {
                name: dict(zip(("first_third", "last_third"), run.of_domain(domain), strict=True))
                for name, run in runs.items()
            }
            for domain in DOMAIN_PROMPTS
        },
        "steps": {
            "static": _step_report(static.step_s, limit_s),
            "rebalanced": _step_report(moving.step_s, limit_s),
            "experts under way": _step_report(moving.step_s[moving.moving], limit_s),
        },
        "same_tokens": static.tokens == moving.tokens,
        "num_tokens": sum(map(len, static.tokens.values())),
        "lost_requests": [*static.failed, *moving.failed],
        "migration": moving.migration,
    }


def _step_report(step_s: NDArray[np.float64], limit_s: float) -> dict[str, float]:
    """Milliseconds, and the share of steps longer than the limit."""
    if not len(step_s):
        return dict.fromkeys(("num", "p50_ms", "p99_ms", "max_ms", "late_share"), 0)
    return {
        "num": len(step_s),
        "p50_ms": 1000 * float(np.median(step_s)),
        "p99_ms": 1000 * float(np.percentile(step_s, 99)),
        "max_ms": 1000 * float(step_s.max()),
        "late_share": float((step_s > limit_s).mean()),
    }


def _serve(config: ServeConfig, load: Load) -> Run:
    run = Run()
    with local_ray(cpus_for(config)), running_cluster(config) as cluster:
        asyncio.run(_traffic(cluster, load, run))
        ranks = cluster.stats()
        run.step_s = np.array([step.seconds for step in ranks[0]["steps"]])
        moving = {step.number for rank in ranks for step in rank["steps"] if step.preparing}
        run.moving = np.array([step.number in moving for step in ranks[0]["steps"]])
        run.migration = _sums([rank["migration"] for rank in ranks])
    return run


def _sums(metrics: list[dict[str, Any]]) -> dict[str, float]:
    """Of all ranks: experts' bytes by where they came from, and what steps waited for at most."""
    sources = {name: sum(m["bytes"][name] for m in metrics) for name in metrics[0]["bytes"]}
    return {
        "layers_changed": metrics[0]["flipped"],
        "failed": sum(m["failed"] for m in metrics),
        "longest_stall_ms": 1e3 * max(m["longest_flip_s"] for m in metrics),
        **{f"bytes_from_{name}": num_bytes for name, num_bytes in sources.items()},
    }


async def _traffic(cluster: RunningCluster, load: Load, run: Run) -> None:
    """All domains, one after the other, with a sample of every rank's load each second."""
    async with AsyncClient(cluster.endpoint) as client:
        start = time.monotonic()
        for domain, prompts in DOMAIN_PROMPTS.items():
            texts = itertools.islice(itertools.cycle(prompts), load.requests)
            requests = iter(enumerate(texts))
            workers = [
                asyncio.create_task(_work(client, domain, requests, load, run))
                for _ in range(load.concurrency)
            ]
            while True:
                ranks = await asyncio.to_thread(cluster.stats)
                served_RL = np.array([rank["expert_load"] for rank in ranks])
                run.samples.append((time.monotonic() - start, domain, served_RL))
                if not (await asyncio.wait(workers, timeout=SAMPLE_S))[1]:
                    break


async def _work(
    client: AsyncClient, domain: str, requests: Iterator[tuple[int, str]], load: Load, run: Run
) -> None:
    """One client: the next request when the last is answered, until none are left."""
    for idx, text in requests:
        name = f"{domain}-{idx}"
        try:
            answer = await client.generate(
                text, max_tokens=load.max_tokens, temperature=0.8, seed=idx, ignore_eos=True
            )
        except ClientError as error:
            run.failed.append(f"{name}: {error}")
        else:
            run.tokens[name] = list(answer.token_ids)


def _show(console: Console, report: dict[str, Any]) -> None:
    table = Table("domain", "static", "rebalanced: first third", "last third", title="balancedness")
    for domain, row in report["domains"].items():
        moving = row["rebalanced"]
        table.add_row(
            domain,
            f"{row['static']['last_third']:.3f}",
            f"{moving['first_third']:.3f}",
            f"{moving['last_third']:.3f}",
        )
    console.print(table)
    table = Table("steps of", "number", "p50 ms", "p99 ms", "max ms", f"> {LATE} x static p99")
    for name, row in report["steps"].items():
        table.add_row(
            name,
            f"{row['num']:,}",
            *(f"{row[key]:.1f}" for key in ("p50_ms", "p99_ms", "max_ms")),
            f"{row['late_share']:.2%}",
        )
    console.print(table)
    same = "the same" if report["same_tokens"] else "DIFFERENT"
    console.print(
        f"{report['num_tokens']:,} tokens, {same} in both runs; "
        f"{len(report['lost_requests'])} requests lost; migration: {report['migration']}"
    )
