"""Our exchange between the GPUs of a node: its links, as dispatch and combine see them.

Two GPUs are measured. What a rank of more would send them goes over the same ports, so alpha and beta are
taken for any number; the rest is the cost model's arithmetic.

Legend: T tokens of a rank, K experts per token, W ranks.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from cluster.model.config import ModelConfig
from comms.codecs import CODECS
from experts.kernels.combine import weighted_sum
from experts.kernels.sort_by_slot import sort_by_slot
from simulations.bench import bench_dispatch_gpu
from simulations.bench.exchange_workload import GpuWorkload
from simulations.hardware.gpu_meter import Meter
from simulations.hardware.own_products import normal

RANKS = 2
TOKENS = (16, 128, 1024, 4096)


def exchange_times(
    model: ModelConfig, meter: Meter, tokens: tuple[int, ...] = TOKENS
) -> dict[str, Any]:
    """{way: {"bytes": [...], "seconds": [...]}} of dispatch in both dtypes, of combine "fixed" and "node".

    Combine adds up the pairs of a row on the way; experts' tables have that in them already, so it is
    taken off. Bytes are the rows' payload.
    """
    hidden, gate = model.hidden_size, model.gate
    workload = GpuWorkload(
        ranks=RANKS, tokens=tokens, hidden=hidden,
        num_experts=gate.num_experts, num_topk=gate.num_experts_per_token,
    )  # fmt: skip
    results = bench_dispatch_gpu.run(workload, peers=False)["results"]
    rows = [results["combine_pairs"][str(t)]["bytes"] / (2 * hidden) for t in tokens]
    found: dict[str, Any] = {}
    for way, dtype, sums in (
        ("dispatch_float8", "float8", None),
        ("dispatch_bfloat16", "bfloat16", None),
        ("combine_fixed", "bfloat16", True),
        ("combine_pairs", "bfloat16", False),
    ):
        row_bytes = CODECS[dtype].row_bytes(hidden, torch.bfloat16)
        seconds = [1e-6 * results[way][str(t)]["us"] for t in tokens]
        if sums is not None:
            alone = [_local_sums(model, meter, RANKS * t, in_integers=sums) for t in tokens]
            seconds = [max(s - a, 0.1 * s) for s, a in zip(seconds, alone, strict=True)]
        found[way] = {
            "tokens": list(tokens),
            "bytes": [round(row_bytes * n) for n in rows],
            "seconds": [float(f"{s:.4g}") for s in seconds],
        }
    return found


def _local_sums(model: ModelConfig, meter: Meter, rows: int, *, in_integers: bool) -> float:
    """Seconds to add up the pairs of so many received rows where they are."""
    each = model.gate.num_experts_per_token
    slots_RK = torch.full((rows, each), -1, dtype=torch.int32, device=meter.device)
    slots_RK[:, : max(1, each // RANKS)] = 0
    pairs = sort_by_slot(slots_RK, 1)
    y_PH = normal(meter, slots_RK.numel(), model.hidden_size)
    weights_RK = torch.rand(slots_RK.shape, device=meter.device)
    range_R = 8 + torch.rand(rows, device=meter.device) if in_integers else None
    return meter.seconds([partial(weighted_sum, y_PH, pairs, weights_RK, range_R=range_R)]).p50
