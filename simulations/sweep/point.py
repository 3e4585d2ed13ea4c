"""One point of a sweep: does it fit, and if so, what a short run under its policy gives.

The result of a point that runs, besides `status` "ok":

    throughput, tokens_per_s_per_rank    tokens/s of the whole cluster, and of a rank
    tpot_ms, step_ms_p99                 a step is one token of every sequence
    imbalance_mean, imbalance_p99        served, max / mean over ranks
    node_bytes_per_token                 between nodes, per token and layer
    migrated_bytes                       of experts, during the run
    memory_bytes, free_bytes             of a rank, with every sequence at its full context
    warnings                             what the cost model had to extrapolate, "" for nothing
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import router
import simulations
from comms.topology import Topology
from simulations.balance.load_balance import BalanceSpec, simulate
from simulations.balance.load_shares import Workload
from simulations.deployment import ComputeDtype, Deployment, Overlap
from simulations.hardware.calibration import Calibration
from simulations.memory import DoesNotFit, MemoryPlan, rank_memory
from simulations.presets import load_model
from simulations.sweep.sweep import Point

_FIGURES = (
    "imbalance_mean",
    "imbalance_p99",
    "node_bytes_per_token",
    "migrated_bytes",
)


@dataclass(frozen=True, kw_only=True)
class Study:
    """What all points of a sweep share. Raises what its parts raise for what cannot be."""

    preset: str
    calibration: Calibration
    workload: Workload
    weights: ComputeDtype = "float8"
    steps: int = 200
    seed: int = 0

    def about(self) -> dict[str, Any]:
        """Everything besides the point that its result depends on, as JSON."""
        return {
            "version": version("expertmesh"),
            "code": _hash_of_code(),
            "calibration": self.calibration.hash,
            "model": repr(load_model(self.preset)),
            "workload": asdict(self.workload),
            "weights": self.weights,
            "steps": self.steps,
            "seed": self.seed,
        }

    def deployment(self, point: Point) -> Deployment:
        """Raises ValueError for a layout that cannot be."""
        return Deployment(
            model=load_model(self.preset),
            topology=Topology(
                num_nodes=point.num_nodes,
                ranks_per_node=point.ranks_per_node,
                tensor_parallel_size=1,
            ),
            num_redundant_experts=point.num_redundant_experts,
            weights=self.weights,
            overlap=cast(Overlap, point.overlap),
        )

    def spec(self, point: Point) -> BalanceSpec:
        """The run of a point. Raises ValueError, DoesNotFit."""
        return BalanceSpec(
            model_name=self.preset,
            deployment=self.deployment(point),
            calibration=self.calibration,
            load=self.workload,
            policies=(point.policy,),
            steps=self.steps,
            tokens_per_rank=point.tokens_per_rank,
            context=point.context,
            seed=self.seed,
        )


def evaluate(study: Study, point: Point) -> dict[str, Any]:
    """The result of one point; only numbers and text."""
    try:
        memory = _memory(study, point)
        run = simulate(study.spec(point))
    except DoesNotFit as error:
        return {"status": "does not fit", "why": str(error), "missing_bytes": -memory.free}
    except ValueError as error:
        return {"status": "impossible", "why": str(error)}
    found = run["policies"][point.policy]
    return {
        "status": "ok",
        "throughput": found["throughput"],
        "tokens_per_s_per_rank": found["throughput"] / (point.num_nodes * point.ranks_per_node),
        "tpot_ms": found["step_ms_mean"],
        "step_ms_p99": found["step_ms_p99"],
        **{name: found[name] for name in _FIGURES},
        "memory_bytes": memory.total,
        "free_bytes": memory.free,
        "warnings": "; ".join(run["warnings"]),
    }


def _hash_of_code() -> str:
    """Of the simulator and the router: between releases the version says nothing."""
    folders = [Path(simulations.__path__[0]), Path(router.__path__[0])]
    files = [file for folder in folders for file in sorted(folder.rglob("*.py"))]
    return sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]


def _memory(study: Study, point: Point) -> MemoryPlan:
    """Of a rank, whether or not it has so much."""
    endless = replace(study.calibration, memory_bytes=float("inf"))
    plan = rank_memory(
        study.deployment(point),
        endless,
        max_tokens=point.tokens_per_rank,
        kv_tokens=point.tokens_per_rank * point.context,
    )
    return replace(plan, capacity=study.calibration.memory_bytes)
