"""A grid of clusters: every combination of its choices, evaluated apart, resumable.

A point is one cluster under one policy. What becomes of it is one of

    "ok"            throughput, step times, balance, traffic, memory (keys in `sweep_point.py`)
    "does not fit"  the ranks' memory; `missing_bytes` says by how much
    "impossible"    a layout that cannot exist, with the equation that says so

The result is the same bytes whatever the number of processes and however often it was interrupted:
points are seeded by what they are, stored as they finish and listed in the order of the grid.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, fields
from itertools import product
from typing import Any

from simulations.processes import each_finished
from simulations.sweep.point_store import PointStore, key_of

Evaluate = Callable[["Point"], dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Point:
    """One cluster, one load, one policy."""

    num_nodes: int
    ranks_per_node: int
    num_redundant_experts: int
    tokens_per_rank: int
    context: int
    overlap: str
    policy: str


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Values along each axis; the last axis varies fastest. ValueError for an axis without any."""

    num_nodes: tuple[int, ...]
    ranks_per_node: tuple[int, ...]
    num_redundant_experts: tuple[int, ...]
    tokens_per_rank: tuple[int, ...]
    context: tuple[int, ...]
    overlap: tuple[str, ...]
    policy: tuple[str, ...]

    def __post_init__(self) -> None:
        least = dict.fromkeys(("num_nodes", "ranks_per_node", "tokens_per_rank", "context"), 1)
        for axis, values in asdict(self).items():
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{axis} needs values that differ, got {list(values)}")
            for value in values:
                if not isinstance(value, str) and value < least.get(axis, 0):
                    raise ValueError(f"{axis} must be at least {least.get(axis, 0)}, got {value}")

    def __len__(self) -> int:
        return sum(1 for _ in self.points())

    def points(self) -> Iterator[Point]:
        axes = [field.name for field in fields(self)]
        for values in product(*(getattr(self, axis) for axis in axes)):
            yield Point(**dict(zip(axes, values, strict=True)))


@dataclass
class Swept:
    """What a sweep found so far, in the order of the grid."""

    results: dict[Point, dict[str, Any]]
    num_points: int
    interrupted: bool = False


def sweep(
    points: Sequence[Point],
    evaluate: Evaluate,
    *,
    store: PointStore,
    about: Any,
    num_processes: int = 1,
    finished: Callable[[int], None] = lambda count: None,
) -> Swept:
    """Evaluate the points that `store` lacks; KeyboardInterrupt ends it with what is done.

    about: everything besides the point that results depend on, as JSON. `finished` hears how many
    points are there. Raises what `evaluate` raises, RuntimeError if a process dies, PointStoreError.
    """
    key = {point: key_of(asdict(point), about) for point in points}
    missing = [point for point in points if store.get(key[point]) is None]
    done = len(points) - len(missing)
    interrupted = False
    finished(done)
    try:
        with closing(each_finished(evaluate, missing, num_processes)) as results:
            for count, (point, result) in enumerate(results, start=done + 1):
                store.add(key[point], result)
                finished(count)
    except KeyboardInterrupt:
        interrupted = True
    found = {point: store.get(key[point]) for point in points}
    return Swept(
        results={point: result for point, result in found.items() if result is not None},
        num_points=len(points),
        interrupted=interrupted,
    )


def best_points(results: Sequence[dict[str, Any]], tpot_ms: float) -> dict[str, int | None]:
    """Places in `results` of the most tokens/s: of the cluster, of a rank, and the same among points
    with at most `tpot_ms` per token. None where no point is; the first one of equals."""
    ran = [place for place, result in enumerate(results) if result["status"] == "ok"]
    quick = [place for place in ran if results[place]["tpot_ms"] <= tpot_ms]

    def best(places: list[int], figure: str) -> int | None:
        return max(places, key=lambda place: results[place][figure], default=None)

    return {
        "throughput": best(ran, "throughput"),
        "tokens_per_s_per_rank": best(ran, "tokens_per_s_per_rank"),
        "throughput_within_tpot": best(quick, "throughput"),
        "tokens_per_s_per_rank_within_tpot": best(quick, "tokens_per_s_per_rank"),
    }
