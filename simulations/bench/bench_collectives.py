"""Shared memory, our TCP and gloo side by side: the same collectives, ranks and run.

Each figure is the median over rounds of the slowest rank's median time per call. The transports take
turns round by round, so that a busy machine slows all of them alike.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from comms.groups import Group, InterNodeBackend, NodeBackend, ParallelGroups
from comms.launch import RankPool
from comms.topology import Topology

COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", "barrier")
BACKENDS: dict[str, tuple[NodeBackend, InterNodeBackend]] = {
    "shm": ("shm", "tcp"),
    "tcp": ("gloo", "tcp"),
    "gloo": ("gloo", "gloo"),
}


def run(
    num_ranks: int = 4,
    num_bytes: Sequence[int] = (4096, 65536, 1 << 20),
    rounds: int = 7,
    calls_per_round: int = 15,
    timeout_s: float = 300.0,
) -> dict[str, Any]:
    """{"ranks", "results": {collective: {bytes: {"shm_us", "tcp_us", "gloo_us", "speedup"}}}}; speedup: gloo / shm.

    Bytes are those of a rank's whole input (bfloat16), for a gather those of its whole output.
    """
    if num_ranks < 2:
        raise ValueError(f"a collective needs at least 2 ranks, got {num_ranks}")
    topology = Topology(num_nodes=1, ranks_per_node=num_ranks)
    times: dict[tuple[str, int, str], list[float]] = {}
    with RankPool(num_ranks) as pool:
        for _ in range(rounds):
            for backend, (in_node, across) in BACKENDS.items():
                per_rank = pool.run(
                    _time_rank,
                    topology,
                    tuple(num_bytes),
                    calls_per_round,
                    node_backend=in_node,
                    inter_node_backend=across,
                    timeout_s=timeout_s,
                )
                for name, size in per_rank[0]:
                    slowest = max(seconds[name, size] for seconds in per_rank)
                    times.setdefault((name, size, backend), []).append(slowest)
    return {"ranks": num_ranks, "results": _medians(times, num_bytes)}


def _medians(
    times: dict[tuple[str, int, str], list[float]], num_bytes: Sequence[int]
) -> dict[str, dict[str, dict[str, float]]]:
    results: dict[str, dict[str, dict[str, float]]] = {}
    for name in COLLECTIVES:
        for size in (0,) if name == "barrier" else num_bytes:
            shm, tcp, gloo = (1e6 * statistics.median(times[name, size, b]) for b in BACKENDS)
            results.setdefault(name, {})[str(size)] = {
                "shm_us": round(shm, 1),
                "tcp_us": round(tcp, 1),
                "gloo_us": round(gloo, 1),
                "speedup": round(gloo / shm, 1),
            }
    return results


def _time_rank(
    groups: ParallelGroups, num_bytes: Sequence[int], calls: int
) -> dict[tuple[str, int], float]:
    """Median seconds per call on this rank, by (collective, bytes)."""
    seconds = {}
    for name in COLLECTIVES:
        for size in (0,) if name == "barrier" else num_bytes:
            call = _call(groups.world, name, size)
            call()
            groups.world.barrier()
            times = []
            for _ in range(calls):
                start = time.perf_counter()
                call()
                times.append(time.perf_counter() - start)
            seconds[name, size] = statistics.median(times)
    return seconds


def _call(group: Group, name: str, num_bytes: int) -> Callable[[], Tensor | None]:
    rows = max(1, num_bytes // 2 // group.size)  # per rank
    sizes = [rows] * group.size
    whole = torch.ones(rows * group.size, dtype=torch.bfloat16)
    if name == "all_reduce":
        return lambda: group.all_reduce(whole)
    if name == "all_gather":
        return lambda: group.all_gather(whole[:rows], sizes)
    if name == "reduce_scatter":
        return lambda: group.reduce_scatter(whole, sizes)
    if name == "all_to_all":
        return lambda: group.all_to_all(whole, sizes, sizes)
    if name == "broadcast":
        return lambda: group.broadcast(whole, 0)
    return lambda: group.barrier()
