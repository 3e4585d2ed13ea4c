"""What a GPU does to rows besides products, by our kernels, as no library has them: norm, quantise, activate,
permute, choose experts; and its memory, and what a launch costs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cluster.model.config import MlaConfig, ModelConfig
from cluster.model.cuda.fused import rms_norm
from experts.kernels.choose import choose
from experts.kernels.quantize import quantize
from experts.kernels.swiglu import swiglu_quantized
from simulations.hardware.gpu_products import random_float8, spread
from simulations.hardware.gpu_timing import Call, copies_of, seconds_of
from simulations.hardware.tables import table_json

EPS = 1e-6


def row_tables(model: ModelConfig, rows: Sequence[int]) -> dict[str, Any]:
    """{"rows/<operation>/<channels read>": table over "tokens"}, and what the cost model looks up:
    "elementwise/attention/<hidden>", all of attention but products and core."""
    hidden, intermediate = model.hidden_size, model.expert_intermediate_size
    normed, quantised = {hidden}, {hidden}
    if isinstance(model.attention, MlaConfig):
        normed |= {model.attention.q_lora_rank, model.attention.kv_lora_rank}
        output = model.attention.num_heads * model.attention.v_head_dim
        quantised |= {model.attention.q_lora_rank, output}
    tables = {f"rows/norm/{h}": _table(rows, _norms(h)) for h in sorted(normed - {0})}
    tables |= {f"rows/quantise/{h}": _table(rows, _quantises(h)) for h in sorted(quantised - {0})}
    parts = list(tables)
    total = np.sum([tables[name]["values"] for name in parts], axis=0)
    tables[f"elementwise/attention/{hidden}"] = table_json(
        {"tokens": rows}, total, what=f"sum of {', '.join(parts)}; without rotation, cache write"
    )
    tables[f"rows/swiglu_quantise/{2 * intermediate}"] = _table(
        rows, _quantises(2 * intermediate, gated=True)
    )
    tables[f"rows/permute/{hidden}"] = _table(rows, lambda tokens: _permutes(tokens, hidden))
    return tables


def gate_tables(model: ModelConfig, rows: Sequence[int]) -> dict[str, Any]:
    """ "gate/<experts>x<hidden>": norm, PyTorch's product in bfloat16, choice of experts."""
    gate, hidden = model.gate, model.hidden_size
    gain_H, w_EH = _random(hidden), _random(gate.num_experts, hidden)
    bias_E = torch.randn(gate.num_experts, device="cuda") if model.has_correction_bias else None

    def chosen(x_TH: Tensor) -> object:
        logits_TE = torch.mm(rms_norm(x_TH, gain_H, EPS), w_EH.t()).float()
        return choose(logits_TE, gate, bias_E)

    table = _table(rows, lambda tokens: _calls(chosen, tokens, hidden))
    return {f"gate/{gate.num_experts}x{hidden}": table}


def memory_bandwidth() -> dict[str, float]:
    """Bytes/s: "write" counts those read and those written; "read" is a maximum over 1 GB."""
    x = torch.randn(1 << 15, 1 << 14, device="cuda", dtype=torch.bfloat16)
    y = torch.empty_like(x)
    return {
        "write": 2 * x.nbytes / seconds_of([lambda: torch.neg(x, out=y)]).p50,
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


def _norms(channels: int) -> Callable[[int], list[Call]]:
    gain_H = _random(channels)
    return lambda tokens: _calls(lambda x: rms_norm(x, gain_H, EPS), tokens, channels)


def _quantises(channels: int, *, gated: bool = False) -> Callable[[int], list[Call]]:
    return lambda tokens: _calls(swiglu_quantized if gated else quantize, tokens, channels)


def _calls(op: Callable[[Tensor], object], tokens: int, channels: int) -> list[Call]:
    inputs = copies_of(lambda: _random(tokens, channels), 2.0 * tokens * channels)
    return [lambda x=x: op(x) for x in inputs]  # type: ignore[misc]


def _permutes(tokens: int, hidden: int) -> list[Call]:
    """FP8 rows into another order, as bytes: not every torch indexes FP8."""
    order_T = torch.randperm(tokens, device="cuda")
    make = lambda: random_float8(tokens, hidden).view(torch.uint8)  # noqa: E731
    inputs = copies_of(make, float(tokens * hidden))
    return [lambda x=x: x.index_select(0, order_T) for x in inputs]  # type: ignore[misc]


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)
