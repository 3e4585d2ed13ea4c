"""What an MoE layer's exchange costs: bytes between hosts, seconds and error, scheme beside scheme.

Every scheme carries the same tokens, routed by the same gate, over the same links, in turns within
one run. Bytes are read from the counters of the hosts' network interfaces, with the dispatcher's own
ledger beside them.
"""

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from comms.dispatcher import TokenDispatcher
from comms.groups import InterNodeBackend, ParallelGroups
from comms.links import measure_links
from comms.trace import NO_TRACE, Trace
from comms.trace_file import write_trace
from simulations import netns
from simulations.bench.hosted import ranks_on
from simulations.bench.moe_layer import Problem, Scheme, Workload, layer_of
from simulations.testbed import INTERFACE

BASELINE = "flat_bf16"


SCHEMES = {
    "flat_bf16": Scheme(dispatcher="flat", per_expert=True, options={"combine": "exact"}),
    "flat_fp8": Scheme(
        dispatcher="flat",
        per_expert=True,
        options={"combine": "exact", "dispatch_dtype": "float8"},
    ),
    "hier_fp8": Scheme(dispatcher="hierarchical", options={"dispatch_dtype": "float8"}),
    "hier_fp8_logfmt": Scheme(
        dispatcher="hierarchical",
        options={"dispatch_dtype": "float8", "combine_dtype": "logfmt10"},
    ),
    "hier_int8_int8": Scheme(
        dispatcher="hierarchical", options={"dispatch_dtype": "int8", "combine_dtype": "int8"}
    ),
    "hier_fp8_fixed": Scheme(
        dispatcher="hierarchical", options={"dispatch_dtype": "float8", "combine": "fixed"}
    ),
}


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One layer on one rank. wire_bytes: sent by my host, on its first rank; None elsewhere."""

    seconds: float
    ledger_bytes: int
    wire_bytes: int | None
    squared_error: float
    squared_reference: float


def run(
    workload: Workload,
    *,
    schemes: Sequence[str] = tuple(SCHEMES),
    repeats: int = 5,
    inter_node_backend: str = "tcp",
    trace_file: Path | None = None,
) -> dict[str, Any]:
    """{"config", "schemes": {name: {wire_bytes, ledger_bytes, seconds_median, seconds_p95,
    rel_l2, ...}}}, all per layer; bytes are those of all hosts together, seconds the slowest rank's.

    With a `trace_file` the spans of all ranks in the timed layers go there. Raises ValueError for
    schemes that do not exist, TestbedError where hosts cannot be made, TraceError for the file.
    """
    if unknown := [name for name in schemes if name not in SCHEMES]:
        raise ValueError(f"there is no scheme {unknown[0]!r}; there are {', '.join(SCHEMES)}")
    if inter_node_backend not in ("tcp", "gloo"):
        raise ValueError(f"inter_node_backend must be tcp or gloo, got {inter_node_backend!r}")
    if not schemes or repeats < 1:
        raise ValueError(f"need a scheme and a repeat, got {list(schemes)} and {repeats}")
    with ranks_on(workload.hosts, workload.ranks_per_host, workload.rate) as pool:
        answers = pool.run(
            _measure,
            workload.topology,
            workload,
            tuple(schemes),
            repeats,
            trace_file is not None,
            timeout_s=4 * (repeats + 1) * len(schemes) * workload.patience_s,
            comm_timeout_s=workload.patience_s,
            inter_node_backend=cast(InterNodeBackend, inter_node_backend),
        )
    if trace_file is not None:
        write_trace(trace_file, [trace for _, trace in answers])
    results = {name: _summary([samples[name] for samples, _ in answers]) for name in schemes}
    return {
        "config": {
            **asdict(workload),
            "repeats": repeats,
            "inter_node_backend": inter_node_backend,
        },
        "schemes": _with_ratios(results),
    }


def _summary(per_rank: Sequence[Sequence[Sample]]) -> dict[str, Any]:
    """Over the repeats, of what all ranks did in each."""
    repeats = list(zip(*per_rank, strict=True))
    seconds = [max(sample.seconds for sample in samples) for samples in repeats]
    wire = [
        sum(sample.wire_bytes for sample in samples if sample.wire_bytes is not None)
        for samples in repeats
        if any(sample.wire_bytes is not None for sample in samples)
    ]
    last = repeats[-1]
    error = sum(sample.squared_error for sample in last)
    return {
        "wire_bytes": int(statistics.median(wire)) if wire else None,
        "ledger_bytes": sum(sample.ledger_bytes for sample in last),
        "seconds_median": statistics.median(seconds),
        "seconds_p95": float(torch.quantile(torch.tensor(seconds, dtype=torch.float64), 0.95)),
        "rel_l2": (error / sum(sample.squared_reference for sample in last)) ** 0.5,
        "seconds": seconds,
    }


def _with_ratios(results: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    base = results.get(BASELINE)
    for row in results.values() if base else ():
        assert base is not None
        kind = "ledger_bytes" if base["wire_bytes"] is None else "wire_bytes"
        row["bytes_ratio"] = row[kind] / base[kind]
        row["seconds_ratio"] = row["seconds_median"] / base["seconds_median"]
    return results


def _measure(
    groups: ParallelGroups, workload: Workload, schemes: Sequence[str], repeats: int, traced: bool
) -> tuple[dict[str, list[Sample]], Trace]:
    """What each rank does: every scheme once to warm up, then all of them in turns."""
    problem = Problem.of_rank(workload, groups.rank)
    node = groups.topology.node_of(groups.rank)
    trace = Trace(groups.rank, node=node, where=groups.where) if traced else NO_TRACE
    groups = replace(groups, links=measure_links(groups.rail, groups.world))
    layers = {name: layer_of(SCHEMES[name], groups, problem, trace) for name in schemes}
    samples: dict[str, list[Sample]] = {name: [] for name in schemes}
    for repeat in range(-1, repeats):
        if repeat == 0:
            trace.clear()
        for turn in range(len(schemes)):
            name = schemes[(turn + repeat) % len(schemes)]
            if groups.rank == 0:
                what = "warm-up" if repeat < 0 else f"repeat {repeat + 1} of {repeats}"
                print(f"{what}: {name}", file=sys.stderr, flush=True)
            dispatcher, layer = layers[name]
            with trace.span("scheme", name):
                sample = _sample(groups, workload, problem, dispatcher, layer)
            if repeat >= 0:
                samples[name].append(sample)
    return samples, trace


def _sample(
    groups: ParallelGroups,
    workload: Workload,
    problem: Problem,
    dispatcher: TokenDispatcher,
    layer: Callable[[], Tensor],
) -> Sample:
    counts = workload.hosts > 0 and groups.topology.local_rank_of(groups.rank) == 0
    dispatcher.ledger.clear()
    groups.world.barrier()
    before = netns.counters(INTERFACE).tx_bytes if counts else None
    groups.world.barrier()
    start = time.perf_counter()
    out_TH = layer()
    seconds = time.perf_counter() - start
    groups.world.barrier()
    wire_bytes = None if before is None else netns.counters(INTERFACE).tx_bytes - before
    difference_TH = out_TH.double() - problem.expected_TH
    return Sample(
        seconds=seconds,
        ledger_bytes=dispatcher.ledger.inter_node_bytes(),
        wire_bytes=wire_bytes,
        squared_error=float(difference_TH.square().sum()),
        squared_reference=float(problem.expected_TH.square().sum()),
    )
