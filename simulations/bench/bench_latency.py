"""Decode latency: microseconds per dispatch and combine of a few tokens, by dispatcher and transport.

Layer follows layer without a pause, as in a decode step. Each figure is the median over rounds of
the slowest rank's median. Transports take turns round by round, so that a busy machine slows all
alike.
"""

import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from comms.groups import InterNodeBackend, NodeBackend, ParallelGroups
from comms.make import DISPATCHERS
from simulations.bench.hosted import ranks_on
from simulations.bench.moe_layer import Problem, Scheme, Workload, layer_of

TOKENS = (1, 2, 4, 8, 16, 32)
# (inside a node, between nodes); "gloo" inside means no shared memory: what runs between nodes.
TRANSPORTS: tuple[tuple[NodeBackend, InterNodeBackend], ...] = (
    ("shm", "tcp"),
    ("shm", "gloo"),
    ("gloo", "tcp"),
    ("gloo", "gloo"),
)
WARM_UP_LAYERS = 3


def run(
    workload: Workload,
    *,
    tokens: Sequence[int] = TOKENS,
    rounds: int = 3,
    layers_per_round: int = 20,
    timeout_s: float = 300.0,
) -> dict[str, Any]:
    """{"config", "results": [{"dispatcher", "inside", "between", "us": {tokens: median}}]}.

    `workload.tokens` is not used. Raises ValueError, and TestbedError where hosts cannot be made.
    """
    if rounds < 1 or layers_per_round < 1 or not tokens or min(tokens) < 1:
        raise ValueError(
            f"need rounds, layers, tokens >= 1: {rounds}, {layers_per_round}, {tokens}"
        )
    seconds: dict[tuple[str, str, str, int], list[float]] = {}
    with ranks_on(workload.hosts, workload.ranks_per_host, workload.rate) as pool:
        for _ in range(rounds):
            for inside, between in TRANSPORTS:
                per_rank = pool.run(
                    _time_rank,
                    workload.topology,
                    workload,
                    tuple(tokens),
                    layers_per_round,
                    timeout_s=timeout_s,
                    node_backend=inside,
                    inter_node_backend=between,
                )
                for name, number in per_rank[0]:
                    slowest = max(medians[name, number] for medians in per_rank)
                    seconds.setdefault((name, inside, between, number), []).append(slowest)
    return {
        "config": {**asdict(workload), "rounds": rounds, "layers_per_round": layers_per_round},
        "results": [
            {
                "dispatcher": name,
                "inside": between if inside == "gloo" else inside,
                "between": between,
                "us": {
                    str(number): 1e6 * statistics.median(seconds[name, inside, between, number])
                    for number in tokens
                },
            }
            for name in DISPATCHERS
            for inside, between in TRANSPORTS
        ],
    }


def _time_rank(
    groups: ParallelGroups, workload: Workload, tokens: Sequence[int], layers: int
) -> dict[tuple[str, int], float]:
    """Median seconds per layer on this rank, by (dispatcher, tokens)."""
    medians = {}
    for number in tokens:
        problem = Problem.of_rank(replace(workload, tokens=number), groups.rank)
        for name in DISPATCHERS:
            scheme = Scheme(dispatcher=name, options={"dispatch_dtype": "float8"})
            _, layer = layer_of(scheme, groups, problem)
            for _ in range(WARM_UP_LAYERS):
                layer()
            groups.world.barrier()
            times = []
            for _ in range(layers):
                start = time.perf_counter()
                layer()
                times.append(time.perf_counter() - start)
            medians[name, number] = statistics.median(times)
    return medians
