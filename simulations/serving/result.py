"""What a run of simulated serving found, as plain values for JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from simulations.serving.front_end import Request
from simulations.serving.setup import Served
from simulations.serving.simulation import Simulation

_QUANTILES = range(101)


def head(served: Served) -> dict[str, Any]:
    """What was simulated."""
    deployment, model = served.deployment, served.deployment.model
    limits = served.limits()
    return {
        "calibration": {"name": served.calibration.name, "hash": served.calibration.hash},
        "model": {
            "name": served.model_name or model.architecture,
            "num_experts": model.num_experts,
            "num_moe_layers": model.num_moe_layers,
            "top_k": model.gate.num_experts_per_token,
        },
        "cluster": {
            "num_nodes": deployment.topology.num_nodes,
            "ranks_per_node": deployment.topology.ranks_per_node,
            "tensor_parallel_size": deployment.topology.tensor_parallel_size,
            "num_replicas": deployment.topology.num_replicas,
            "slots_per_rank": deployment.slots_per_rank,
            "num_redundant_experts": deployment.num_redundant_experts,
            "weights": deployment.weights,
            "kv_dtype": deployment.kv_dtype,
            "dispatcher": deployment.dispatcher,
            "overlap": deployment.overlap,
            "policy": served.policy,
            "cold_start": served.cold_start,
            "max_num_seqs": limits.max_num_seqs,
            "max_num_batched_tokens": limits.max_num_batched_tokens,
            "block_size": limits.block_size,
            "num_blocks": limits.num_blocks,
            "max_model_len": limits.max_model_len,
            "max_num_queued_reqs": served.max_num_queued_reqs,
        },
    }


def outcome(simulation: Simulation, served: Served) -> dict[str, Any]:
    """What happened to the requests."""
    front, record = simulation.front_end, simulation.record
    num_ranks = served.deployment.num_ranks
    samples = record.samples()
    computed = float(samples["input_tokens"].sum())
    ttft, tpot = ttft_s(front.finished), tpot_s(front.finished)
    output = float(samples["output_tokens"].sum())
    prompts = sum(request.arrival.prompt_tokens for request in front.finished)
    duration_s = simulation.now_s or 1.0
    return {
        "steps": record.num_steps,
        "tokens_per_rank": computed / max(1, record.num_steps) / num_ranks,
        "duration_s": simulation.now_s,
        "requests": {
            "submitted": front.num_submitted,
            "finished": len(front.finished),
            "rejected": front.num_rejected,
            "failed": front.num_failed,
            "preemptions": sum(replica.num_preemptions for replica in simulation.replicas),
            "resubmitted": front.num_resubmitted,
        },
        "ttft_s": _spread(ttft),
        "tpot_s": _spread(tpot),
        "cdf": {
            "q": list(_QUANTILES),
            "ttft_s": _quantiles(ttft, _QUANTILES),
            "tpot_s": _quantiles(tpot, _QUANTILES),
        },
        "throughput": {
            "output_tokens_per_s": output / duration_s,
            "total_tokens_per_s": (output + prompts) / duration_s,
            "tokens_per_s_per_rank": output / duration_s / num_ranks,
            "tokens_per_s_per_user": 1 / float(np.mean(tpot)) if len(tpot) else None,
        },
        "series": record.series(),
        "events": [
            event._asdict() for event in sorted(record.events, key=lambda event: event.time_s)
        ],
        "memory": served.memory().as_dict(),
    }


def ttft_s(requests: Sequence[Request]) -> list[float]:
    """Seconds from arrival to the first token."""
    return [request.first_token_s - request.arrival.time_s for request in requests]


def tpot_s(requests: Sequence[Request]) -> list[float]:
    """Seconds per output token after the first, of requests with more than one."""
    return [
        (request.finish_s - request.first_token_s) / (request.emitted - 1)
        for request in requests
        if request.emitted > 1
    ]


def _quantiles(values: Sequence[float], quantiles: Sequence[int]) -> list[float]:
    return np.percentile(values, list(quantiles)).tolist() if len(values) else []


def _spread(values: Sequence[float]) -> dict[str, float | None]:
    if not len(values):
        return dict.fromkeys(("mean", "p50", "p90", "p99"))
    p50, p90, p99 = _quantiles(values, (50, 90, 99))
    return {"mean": float(np.mean(values)), "p50": p50, "p90": p90, "p99": p99}
