"""What came out of a run, for tables, reports and programs.

T steps, L layers, E experts, R ranks, N nodes; records: one of each unit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

import numpy as np

from simulations.balance.divisions import Array
from simulations.balance.load_shares import FloatArray
from simulations.balance.run_record import PARTS, PolicyRecord, UnitRecord
from simulations.balance.spec import BalanceSpec, Trace

POINTS = 400
"""Of a series at most; each is a mean over as many steps."""


def balance_result(
    spec: BalanceSpec, units: list[UnitRecord], warnings: list[str], command: tuple[str, ...]
) -> dict[str, Any]:
    """The result of a run, but for "steps_per_s"; keys in the order in which people read them."""
    deployment, model = spec.deployment, spec.deployment.model
    topology = deployment.topology
    load = spec.load
    workload = (
        {**asdict(load), "name": "trace", "path": load.path.name}
        if isinstance(load, Trace)
        else asdict(load)
    )
    return {
        "kind": "balance",
        "version": version("expertmesh"),
        "seed": spec.seed,
        "command": list(command),
        "calibration": {"name": spec.calibration.name, "hash": spec.calibration.hash},
        "model": {
            "name": spec.model_name,
            "num_experts": model.num_experts,
            "num_moe_layers": model.num_moe_layers,
            "top_k": model.gate.num_experts_per_token,
        },
        "cluster": {
            "num_nodes": topology.num_nodes,
            "ranks_per_node": topology.ranks_per_node,
            "tensor_parallel_size": topology.tensor_parallel_size,
            "slots_per_rank": deployment.slots_per_rank,
            "num_redundant_experts": deployment.num_redundant_experts,
            "weights": deployment.weights,
            "dispatch_dtype": deployment.dispatch_dtype,
            "combine_dtype": deployment.combine_dtype,
            "dispatcher": deployment.dispatcher,
            "overlap": deployment.overlap,
            "units": len(units),
        },
        "workload": workload,
        "steps": units[0].num_steps,
        "tokens_per_rank": spec.tokens_per_rank,
        "context": spec.context,
        "phase": spec.phase,
        "interval": spec.interval,
        "window": spec.window,
        "eplb_interval": spec.eplb_interval,
        "steps_per_s": 0.0,
        "warnings": list(warnings),
        "expert_load_LE": _shares(units),
        "policies": {
            name: policy_result([unit.policies[name] for unit in units], spec.tokens)
            for name in spec.policies
        },
    }


def policy_result(records: Sequence[PolicyRecord], tokens: int) -> dict[str, Any]:
    """`policies.<name>` of the result; tokens: of one unit's step.

    Times and rates are of all units together; bytes and rows of traffic are means per token and layer,
    those between ranks inside nodes. `throughput` counts what moving experts costs,
    `throughput_bare` does not. Matrices by rank are those of the first unit.
    """
    imbalance = np.concatenate([record.imbalance_TL.ravel() for record in records])
    difference = np.concatenate([record.difference_TL.ravel() for record in records])
    planned = np.mean([record.planned_TL.mean(dtype=np.float64) for record in records])
    steps_s = np.concatenate([record.steps_s_T for record in records])
    bytes_NN = np.mean([record.bytes_NN for record in records], axis=0)
    rebalances = _rebalances(records)
    first = records[0]
    return {
        "imbalance_mean": _round(imbalance.mean(dtype=np.float64)),
        "imbalance_p99": _round(np.quantile(imbalance, 0.99)),
        "planned_imbalance": _round(planned),
        "difference_mean": _round(difference.mean(dtype=np.float64)),
        "difference_p99": _round(np.quantile(difference, 0.99)),
        "planned_difference": _round(np.mean([r.planned_difference for r in records])),
        "node_bytes_per_token": _round(bytes_NN.sum() - np.trace(bytes_NN)),
        "node_rows_per_token": _round(np.mean([record.node_rows for record in records])),
        "rank_bytes_per_token": _round(np.trace(bytes_NN)),
        "migrated_bytes": sum(rebalance["bytes"] for rebalance in rebalances),
        "moves": sum(rebalance["moves"] for rebalance in rebalances),
        "throughput": _round(sum(_rate(r.steps_s_T, tokens) for r in records)),
        "throughput_bare": _round(sum(_rate(r.bare_s_T, tokens) for r in records)),
        "step_ms_mean": _round(1e3 * steps_s.mean()),
        "step_ms_p99": _round(1e3 * np.quantile(steps_s, 0.99)),
        "straggler": _straggler(records),
        "rebalances": rebalances,
        "series": _series(records, tokens),
        "rank_load_LR": {
            "before": _rounded(first.before_LR),
            "after": _rounded(first.after_LR),
        },
        "node_traffic_NN": _rounded(bytes_NN),
        "layer_ms": {
            part.removesuffix("_BL"): _round(1e3 * np.mean([r.part_s[part] for r in records]))
            for part in PARTS
        },
    }


def _shares(units: Sequence[UnitRecord]) -> list[list[float]]:
    """[L, E] of all tokens, times the number of experts: 1 is the mean."""
    load_LE = np.sum([unit.load_LE for unit in units], axis=0)
    share_LE: list[list[float]] = _rounded(load_LE / load_LE.mean(axis=1, keepdims=True))
    return share_LE


def _rate(seconds_T: FloatArray, tokens: int) -> float:
    return float(len(seconds_T) * tokens / seconds_T.sum())


def _straggler(records: Sequence[PolicyRecord]) -> dict[str, Any]:
    """The rank that most often has most tokens of its unit, and in which part of steps and layers."""
    often_R = np.concatenate([record.slowest_R for record in records])
    rank = int(often_R.argmax())
    return {"rank": rank, "share": _round(often_R[rank] / records[0].slowest_R.sum())}


def _rebalances(records: Sequence[PolicyRecord]) -> list[dict[str, Any]]:
    """Of all units, those of a step together; the longest pause counts."""
    by_step: dict[int, dict[str, Any]] = {}
    for rebalance in [rebalance for record in records for rebalance in record.rebalances]:
        total = by_step.setdefault(
            rebalance.step,
            {"step": rebalance.step, "layers": 0, "moves": 0, "bytes": 0, "pause_s": 0.0},
        )
        total["layers"] += rebalance.layers
        total["moves"] += rebalance.moves
        total["bytes"] += rebalance.bytes
        total["pause_s"] = max(total["pause_s"], _round(rebalance.pause_s))
    return [by_step[step] for step in sorted(by_step)]


def _series(records: Sequence[PolicyRecord], tokens: int) -> dict[str, list[float]]:
    """Means over consecutive steps, named by the first one; balancedness is mean / max."""
    steps = min(record.num_steps for record in records)
    starts = np.arange(0, steps, -(-steps // POINTS))
    sizes = np.diff(starts, append=steps)

    def means(values_T: Array) -> Array:
        return np.asarray(np.add.reduceat(values_T[:steps], starts) / sizes)

    return {
        "step": starts.tolist(),
        "balancedness": _rounded(
            np.mean([means((1 / r.imbalance_TL).mean(axis=1)) for r in records], axis=0)
        ),
        "planned_balancedness": _rounded(
            np.mean([means((1 / r.planned_TL).mean(axis=1)) for r in records], axis=0)
        ),
        "throughput": _rounded(np.sum([tokens / means(r.steps_s_T) for r in records], axis=0)),
    }


def _round(value: Any) -> float:
    """Six significant digits: what differs beyond is not worth a diff."""
    return float(f"{float(value):.6g}")


def _rounded(values: Array) -> Any:
    """Nested lists of five significant digits."""
    flat = [
        float(f"{value:.5g}") for value in np.asarray(values, dtype=np.float64).ravel().tolist()
    ]
    return np.array(flat).reshape(values.shape).tolist()
