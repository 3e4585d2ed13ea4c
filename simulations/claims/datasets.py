"""The routing that claims are examined on, each on a cluster of its own.

    drawn      DeepSeek-V3 on 8 nodes x 8 ranks; loads of experts are lognormal (log-sd 1), each
               batch's jittered by 0.1
    recorded   DeepSeek-V2-Lite on 4 nodes x 4 ranks, routing recorded from it

Each rank has one spare slot, every step 128 tokens of each rank with 4,096 keys.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from comms.topology import Topology
from simulations.balance.load_balance import BalanceSpec, Trace, simulate, spare_slot_each
from simulations.balance.load_shares import Workload
from simulations.deployment import Deployment
from simulations.hardware.calibration import Calibration
from simulations.presets import load_model

Policies = dict[str, dict[str, Any]]
Changes = Mapping[str, Any]

BATCHES: Mapping[str, Changes] = {
    "decode, 128 a rank": {},
    "decode, 32 a rank": {"tokens_per_rank": 32},
    "prompts, 8192 a rank": {"phase": "prefill", "tokens_per_rank": 8192},
}
"""Of `throughput`; the first is the one that its verdict is about."""
_SHORTER = 5
"""Runs beside the main one have a fifth of its steps."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Dataset:
    """loads: other loads of experts by name, as changes of `spec`; the first is spec's own.
    flags: what makes `expertmesh simulate balance` run `spec`. warnings: of all runs so far."""

    title: str
    spec: BalanceSpec
    loads: Mapping[str, Changes]
    flags: tuple[str, ...]
    warnings: list[str] = field(default_factory=list)
    _results: dict[str, Policies] = field(default_factory=dict)

    def policies(self, changes: Changes | None = None) -> Policies:
        """What each policy did; the same run is made once."""
        changes = changes or {}
        key = repr(sorted(changes.items(), key=str))
        if key not in self._results:
            steps = max(1, self.spec.steps // (_SHORTER if changes else 1))
            spec = replace(self.spec, **{"steps": steps, **changes})
            result = simulate(spec)
            self._results[key] = result["policies"]
            self.warnings.extend(t for t in result["warnings"] if t not in self.warnings)
        return self._results[key]

    def command(self) -> str:
        return " ".join(["expertmesh simulate balance", *self.flags])


def drawn(calibration: Calibration, *, steps: int, seed: int) -> Dataset:
    spec = _spec("deepseek-v3", 8, 8, calibration, Workload(), steps, seed)
    loads: dict[str, Changes] = {
        name: {"load": Workload(name=name)} for name in ("uniform", "zipf")
    }
    shift = Workload(name="task_shift", shift_every=_half(steps))
    loads["task_shift"] = {"load": shift, "steps": steps}
    return Dataset(
        title="DeepSeek-V3, 8 x 8 ranks, drawn",
        spec=spec,
        loads={"lognormal": {}, **loads},
        flags=_flags(spec, "--preset", "deepseek-v3"),
    )


def recorded(calibration: Calibration, trace: Path, *, steps: int, seed: int) -> Dataset:
    """Raises LoadFileError, when it is used, for a file of another model or of none."""
    load = Trace(path=trace, shift_every=_half(steps))
    shift = {"load": replace(load, order="task_shift"), "steps": steps}
    spec = _spec("deepseek-v2-lite", 4, 4, calibration, load, steps, seed)
    return Dataset(
        title="DeepSeek-V2-Lite, 4 x 4 ranks, recorded",
        spec=spec,
        loads={"mixed": {}, "task_shift": shift},
        flags=_flags(spec, "--preset", "deepseek-v2-lite", "--trace", json.dumps(trace.name)),
    )


def _half(steps: int) -> int:
    """Of the run: after so many the task changes, once."""
    return max(1, -(-steps // 2))


def _spec(
    preset: str,
    num_nodes: int,
    ranks_per_node: int,
    calibration: Calibration,
    load: Workload | Trace,
    steps: int,
    seed: int,
) -> BalanceSpec:
    model = load_model(preset)
    topology = Topology(num_nodes=num_nodes, ranks_per_node=ranks_per_node, tensor_parallel_size=1)
    return BalanceSpec(
        model_name=preset,
        deployment=Deployment(
            model=model,
            topology=topology,
            num_redundant_experts=spare_slot_each(model, topology),
        ),
        calibration=calibration,
        load=load,
        steps=steps,
        seed=seed,
    )


def _flags(spec: BalanceSpec, *first: str) -> tuple[str, ...]:
    topology = spec.deployment.topology
    sizes = {
        "nodes": topology.num_nodes,
        "ranks-per-node": topology.ranks_per_node,
        "steps": spec.steps,
        "seed": spec.seed,
        "calibration": spec.calibration.name,
    }
    return (*first, *(part for name, value in sizes.items() for part in (f"--{name}", f"{value}")))
