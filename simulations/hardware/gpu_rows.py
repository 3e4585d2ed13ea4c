"""What a GPU does to rows besides products: norm, quantise, activate, permute, choose experts; and its
memory, and what a launch costs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from simulations.hardware.gpu_kernels import quantise, rms_norm
from simulations.hardware.gpu_products import random_float8, spread
from simulations.hardware.gpu_timing import Call, copies_of, seconds_of
from simulations.hardware.tables import table_json

Maker = Callable[[int], Call]


def row_tables(hidden: int, intermediate: int, rows: Sequence[int]) -> dict[str, Any]:
    """{"rows/<operation>/<channels read>": table over "tokens"} for norm, quantise, swiglu_quantise
    (an expert's activation) and permute."""
    ops: dict[str, tuple[Callable[[Tensor], object], int]] = {
        "norm": (lambda x: rms_norm(x, gain_H), hidden),
        "quantise": (quantise, hidden),
        "swiglu_quantise": (lambda x: quantise(x, gated=True), 2 * intermediate),
    }
    gain_H = _random(hidden)
    tables = {
        f"rows/{name}/{width}": _table(rows, lambda t, op=op, width=width: _calls(op, t, width))  # type: ignore[misc]
        for name, (op, width) in ops.items()
    }
    return {**tables, f"rows/permute/{hidden}": _table(rows, lambda t: _permutes(t, hidden))}


def choice_tables(
    num_experts: int, groups: int, kept: int, k: int, rows: Sequence[int]
) -> dict[str, Any]:
    """One table over "tokens": sigmoid, groups by their two best experts, the k best of those."""

    def call(tokens: int) -> list[Call]:
        logits_TE = torch.randn(tokens, num_experts, device="cuda")
        bias_E = torch.randn(num_experts, device="cuda")

        def choose() -> Tensor:
            scores = logits_TE.sigmoid()
            grouped = (scores + bias_E).view(tokens, groups, -1)
            best = grouped.topk(2, dim=-1).values.sum(-1).topk(kept, dim=-1).indices
            dropped = torch.ones(tokens, groups, device="cuda", dtype=torch.bool)
            dropped = dropped.scatter_(1, best, False)
            ids = grouped.masked_fill(dropped.unsqueeze(2), -torch.inf).flatten(1).topk(k).indices
            weights = scores.gather(1, ids)
            return weights / weights.sum(1, keepdim=True)

        return [choose]

    table = _table(rows, call, kernel="torch operations, not fused")
    return {f"rows/gate_choice/{num_experts}": table}


def memory_bandwidth() -> dict[str, float]:
    """Bytes/s: "copy" counts those read and those written; "read" is a maximum over 1 GB."""
    x = torch.randn(1 << 15, 1 << 14, device="cuda", dtype=torch.bfloat16)
    y = torch.empty_like(x)
    return {
        "copy": 2 * x.nbytes / seconds_of([lambda: y.copy_(x)]).p50,
        "read": x.nbytes / seconds_of([lambda: torch.amax(x, dim=1)]).p50,
    }


def launch_seconds() -> dict[str, float]:
    """ "graph_kernel": from one small kernel of a graph to the next; "graph_launch": what it costs the
    host to start a graph; "eager_kernel": to start a kernel without one."""
    x = torch.zeros(1, device="cuda")
    kernel_s = seconds_of([lambda: x.add_(1)]).p50
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        x.add_(1)
    return {
        "graph_kernel": kernel_s,
        "graph_launch": _host_seconds(graph.replay),
        "eager_kernel": _host_seconds(lambda: x.add_(1)),
    }


def _host_seconds(call: Call) -> float:
    times = []
    for _ in range(20):
        torch.cuda.synchronize()
        start = perf_counter()
        for _ in range(50):
            call()
        times.append((perf_counter() - start) / 50)
    torch.cuda.synchronize()
    return float(np.median(times))


def _table(rows: Sequence[int], calls: Callable[[int], list[Call]], **notes: Any) -> dict[str, Any]:
    times = [seconds_of(calls(tokens)) for tokens in rows]
    return table_json({"tokens": rows}, [t.p50 for t in times], p99_over_p50=spread(times), **notes)


def _calls(op: Callable[[Tensor], object], tokens: int, width: int) -> list[Call]:
    inputs = copies_of(lambda: _random(tokens, width), 2.0 * tokens * width)
    return [lambda x=x: op(x) for x in inputs]  # type: ignore[misc]


def _permutes(tokens: int, hidden: int) -> list[Call]:
    """FP8 rows into another order, as bytes: not every torch indexes FP8."""
    order_T = torch.randperm(tokens, device="cuda")
    make = lambda: random_float8(tokens, hidden).view(torch.uint8)  # noqa: E731
    inputs = copies_of(make, float(tokens * hidden))
    return [lambda x=x: x.index_select(0, order_T) for x in inputs]  # type: ignore[misc]


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)
