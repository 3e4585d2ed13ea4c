"""Results as the simulations write them, made up from a seed.

L MoE layers, E experts, R ranks, N nodes.
"""

from typing import Any

import numpy as np

POLICIES = {"none": 1.7, "eplb": 1.28, "eplb_relabel": 1.27, "static": 1.12, "ours": 1.02}
MADE_WITH = {
    "version": "0.1.0",
    "seed": 7,
    "calibration": {"name": "h100-published", "hash": "0123456789ab"},
    "model": {"name": "deepseek-v3", "num_experts": 256, "num_moe_layers": 58, "top_k": 8},
    "cluster": {
        "num_nodes": 8,
        "ranks_per_node": 8,
        "slots_per_rank": 5,
        "num_redundant_experts": 64,
        "weights": "float8",
    },
    "warnings": [],
}


def command(line: str) -> list[str]:
    return line.split()


def balance_result(
    seed: int = 0,
    *,
    num_layers: int = 58,
    num_ranks: int = 64,
    num_nodes: int = 8,
    num_experts: int = 256,
    policies: dict[str, float] = POLICIES,
    points: int = 200,
) -> dict[str, Any]:
    """Of policies with these mean imbalances."""
    rng = np.random.default_rng(seed)
    return {
        "kind": "balance",
        **MADE_WITH,
        "command": command("expertmesh simulate balance --preset deepseek-v3 --nodes 8"),
        "workload": {"name": "lognormal", "skew": 1.0, "jitter": 0.2},
        "steps": 2000,
        "tokens_per_rank": 128,
        "context": 4096,
        "phase": "decode",
        "steps_per_s": 3120.5,
        "warnings": ["tokens 4096 is beyond the measured range [1, 2048]: extrapolated"],
        "expert_load_LE": share(rng, (num_layers, num_experts), 0.9).tolist(),
        "policies": {
            name: policy_result(rng, name, level, num_layers, num_ranks, num_nodes, points)
            for name, level in policies.items()
        },
    }


def policy_result(
    rng: np.random.Generator,
    name: str,
    level: float,
    num_layers: int,
    num_ranks: int,
    num_nodes: int,
    points: int,
) -> dict[str, Any]:
    step = np.linspace(0, 2000, points)
    drift = 1 + (level - 1) * (1 + 0.3 * np.sin(step / 150))
    served = 1 / (drift + np.abs(rng.normal(0, 0.02, points)))
    traffic_NN = rng.uniform(700, 1100, (num_nodes, num_nodes)) * (0.8 if name == "ours" else 1)
    np.fill_diagonal(traffic_NN, 0)
    spread = (level - 1) * 0.6
    experts_ms = 0.16 * level
    every = {"none": 0, "eplb": 200, "eplb_relabel": 200}.get(name, 330)
    return {
        "imbalance_mean": level,
        "imbalance_p99": level * 1.2,
        "planned_imbalance": 1 + (level - 1) * 0.3,
        "difference_mean": (level - 1) * 1.4,
        "node_bytes_per_token": float(traffic_NN.sum()),
        "node_rows_per_token": 3.2,
        "rank_bytes_per_token": 91_000.0,
        "migrated_bytes": 0 if not every else 3.1e11 / every,
        "moves": 0 if not every else 1234,
        "throughput": 120_000 / level**0.6,
        "throughput_bare": 121_000 / level**0.6,
        "step_ms_mean": 60.1 * level**0.6,
        "step_ms_p99": 66.6 * level**0.6,
        "straggler": {"rank": int(rng.integers(num_ranks)), "share": 0.02 * level},
        "rebalances": [
            {"step": at, "layers": 58, "moves": 120, "bytes": 5.3e9, "pause_s": 0.11}
            for at in (range(every, 2000, every) if every else ())
        ],
        "series": {
            "step": step.tolist(),
            "balancedness": served.tolist(),
            "planned_balancedness": (1 / (1 + (drift - 1) * 0.3)).tolist(),
            "throughput": (120_000 * served**0.6).tolist(),
        },
        "rank_load_LR": {
            "before": share(rng, (num_layers, num_ranks), 0.5).tolist(),
            "after": share(rng, (num_layers, num_ranks), spread).tolist(),
        },
        "node_traffic_NN": traffic_NN.tolist(),
        "layer_ms": {
            "attention": 0.388,
            "gate": 0.019,
            "shared": 0.06,
            "dispatch": 0.187,
            "experts": experts_ms,
            "combine": 0.394,
            "exposed": 0.2,
            "hidden": 0.381,
        },
    }


def share(rng: np.random.Generator, shape: tuple[int, int], spread: float) -> np.ndarray:
    """Lognormal loads over the mean of their row."""
    loads = rng.lognormal(0, spread, shape)
    return loads / loads.mean(axis=1, keepdims=True)


def serve_result(seed: int = 0, *, requests: int = 2000, points: int = 150) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    ttft_s, tpot_s = rng.lognormal(-0.9, 0.6, requests), rng.normal(0.045, 0.006, requests)
    q = np.arange(101)
    time_s = np.linspace(0, 120, points)
    hurt = np.where((time_s > 50) & (time_s < 65), 0.5, 1.0)
    running = 4000 * np.minimum(1, time_s / 15) * hurt
    return {
        "kind": "serve",
        **MADE_WITH,
        "command": command("expertmesh simulate serve --preset deepseek-v3 --fail 50:3:15"),
        "workload": {"arrivals": "poisson", "rate": 90.0, "prompt": 1000, "output": 200},
        "requests": {
            "submitted": requests,
            "finished": requests - 5,
            "rejected": 5,
            "preemptions": 12,
            "resubmitted": 63,
        },
        "ttft_s": spread_of(ttft_s),
        "tpot_s": spread_of(tpot_s),
        "cdf": {
            "q": q.tolist(),
            "ttft_s": np.percentile(ttft_s, q).tolist(),
            "tpot_s": np.percentile(tpot_s, q).tolist(),
        },
        "throughput": {
            "output_tokens_per_s": 91_234.5,
            "total_tokens_per_s": 501_234.5,
            "tokens_per_s_per_rank": 1425.5,
            "tokens_per_s_per_user": 21.9,
        },
        "series": {
            "time_s": time_s.tolist(),
            "output_tokens_per_s": (running * 22 + rng.normal(0, 900, points)).tolist(),
            "running": running.tolist(),
            "waiting": np.where(hurt < 1, 900, rng.poisson(30, points)).tolist(),
            "kv_usage": (running / 5000).tolist(),
            "balancedness": (0.97 - rng.exponential(0.01, points)).tolist(),
        },
        "events": [
            {"time_s": 30.0, "kind": "rebalance", "what": "58 layers, 120 experts"},
            {"time_s": 50.0, "kind": "failure", "what": "rank 3; 63 sequences submitted again"},
            {"time_s": 65.0, "kind": "recovery", "what": "rank 3 is back"},
        ],
        "memory": {
            "capacity": 80e9,
            "replicated": 19.1e9,
            "experts": 12.8e9,
            "kv": 40.2e9,
            "activations": 3.3e9,
            "buffers": 1.2e9,
            "free": 3.4e9,
        },
        "pareto": [
            {
                "concurrency": n,
                "tokens_per_s_per_user": 60 / (1 + n / 4000) ** 1.3,
                "tokens_per_s_per_rank": n * 60 / (1 + n / 4000) ** 1.3 / 64 * (n < 9000 or 0.4),
                "ttft_p50_s": 0.2 + n / 9000,
            }
            for n in (64, 256, 1024, 2048, 4096, 8192, 16384)
        ],
    }


def spread_of(values: np.ndarray) -> dict[str, float]:
    points = {f"p{q}": float(np.percentile(values, q)) for q in (50, 90, 99)}
    return {"mean": float(values.mean()), **points}


def scoreboard_result(seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    targets = []
    for i in range(24):
        published = float(10 ** rng.uniform(0, 4.6))
        error = float(rng.normal(0, 0.04))
        targets.append(
            {
                "id": f"S{1 + i // 3}.{i % 3}",
                "what": f"decode at EP{8 * 2 ** (i % 5)}",
                "source": "DeepEP README, 2025-02-25",
                "conditions": {"ranks": 32, "tokens": 128, "dispatch": "float8"},
                "unit": ("µs", "GB/s", "tokens/s/node")[i % 3],
                "published": published,
                "predicted": published * (1 + error),
                "error": error,
                "blind": i >= 12,
                "note": "",
            }
        )
    soft = targets[0] | {"id": "P1", "error": 0.3, "note": "a mean of 24 hours"}
    return {
        "kind": "scoreboard",
        **MADE_WITH,
        "command": command("expertmesh simulate scoreboard"),
        "calibrations": {"h800-deepep-v1": "946eca4927aa", "h100-published": "ea7fc231abbe"},
        "targets": targets,
        "soft": [soft],
        "orderings": [
            {
                "id": f"O{i}",
                "what": "two micro-batches against one, batch 256",
                "expected": ["b256", "no gain", "b64"],
                "predicted": ["b256", "b64", "no gain"] if i == 4 else ["b256", "no gain", "b64"],
                "values": {"b256": 1.2081, "no gain": 1.0, "b64": 1.01 if i == 4 else 0.882},
                "right": i != 4,
            }
            for i in range(10)
        ],
        "blind": {"median_error": 0.031, "worst_error": 0.082},
    }


def sweep_result(seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    points = []
    for nodes in (4, 8):
        for redundant in (0, 32, 64):
            for tokens in (32, 64, 128, 256):
                for i, policy in enumerate(("none", "eplb", "ours")):
                    fits = (nodes, redundant) != (4, 64)
                    tpot_ms = float(30 + tokens / 5 + rng.normal() - 4 * i)
                    result = {
                        "status": "ok",
                        "throughput": 1000 * tokens * nodes * 8 / tpot_ms,
                        "tokens_per_s_per_rank": 1000 * tokens / tpot_ms,
                        "tpot_ms": tpot_ms,
                        "imbalance_mean": 1.5 - 0.2 * i,
                        "memory_bytes": 6e10,
                    }
                    point = {
                        "num_nodes": nodes,
                        "ranks_per_node": 8,
                        "num_redundant_experts": redundant,
                        "tokens_per_rank": tokens,
                        "context": 4096,
                        "overlap": "none",
                        "policy": policy,
                    }
                    too_large = {"status": "does not fit", "why": "4.2 GB too much"}
                    too_large |= {"missing_bytes": 4.2e9}
                    points.append({"point": point, "result": result if fits else too_large})
    return {
        "kind": "sweep",
        **MADE_WITH,
        "command": command("expertmesh simulate sweep --nodes 4,8"),
        "grid": {"num_nodes": [4, 8]},
        "tpot_ms": 60.0,
        "points": points,
    }


def claims_result() -> dict[str, Any]:
    return {
        "kind": "claims",
        **MADE_WITH,
        "command": command("expertmesh simulate claims"),
        "rows": [
            {
                "claim": "traffic between nodes",
                "published": "−60 %",
                "baseline": "flat dispatch in BF16, one copy of a token for each of its experts",
                "measured": "−63 %",
                "command": "expertmesh simulate claims --only traffic",
                "verdict": "reproduces",
                "why": "one copy per node, FP8, sums inside the node",
            },
            {
                "claim": "throughput by balance",
                "published": "+30 %",
                "baseline": "experts stay where they start",
                "measured": "+18 %",
                "command": "expertmesh simulate claims --only balance",
                "verdict": "partly",
                "why": "weight reads hide skew in small batches",
            },
        ],
    }


def all_results() -> list[dict[str, Any]]:
    return [
        balance_result(),
        serve_result(),
        scoreboard_result(),
        sweep_result(),
        claims_result(),
    ]
