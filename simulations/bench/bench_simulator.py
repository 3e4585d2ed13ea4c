"""How many steps of a cluster the cost model computes in a second, and in how much memory.

Two sizes, both DeepSeek-V3 decoding 128 sequences a rank at a context of 4096: 64 ranks on one core,
and 9,936 ranks, 69 units of 144 that each have loads of their own, on two. Loads are lognormal
(sigma 0.3), each step's counts normal around them with a Poisson's variance.

B steps or units, L expert layers, S slots of a unit's ranks.
"""

from __future__ import annotations

import resource
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from comms.topology import Topology
from simulations.cost import CostModel, StepWork
from simulations.deployment import Deployment
from simulations.hardware.calibration import Calibration
from simulations.presets import load_model

Array = NDArray[np.float32]

SEED = 20261122
SEQUENCES, CONTEXT, SIGMA = 128, 4096, 0.3
BLOCK = 16
"""Steps or units computed together: enough to forget Python's own time."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """`units` groups of ranks that share nothing, each a deployment of its own."""

    num_nodes: int
    ranks_per_node: int
    num_redundant_experts: int
    units: int
    cores: int

    @property
    def num_ranks(self) -> int:
        return self.units * self.num_nodes * self.ranks_per_node

    @property
    def deployment(self) -> Deployment:
        return Deployment(
            model=load_model("deepseek-v3"),
            topology=Topology(
                num_nodes=self.num_nodes, ranks_per_node=self.ranks_per_node, tensor_parallel_size=1
            ),
            num_redundant_experts=self.num_redundant_experts,
        )


SIZES = {
    "ep64": Size(num_nodes=8, ranks_per_node=8, num_redundant_experts=64, units=1, cores=1),
    "ep144x69": Size(num_nodes=18, ranks_per_node=8, num_redundant_experts=32, units=69, cores=2),
}


class Loads:
    """The mean loads of some units, and their counts in any step."""

    def __init__(self, deployment: Deployment, units: range) -> None:
        model = deployment.model
        rng = np.random.default_rng([SEED, units.start])
        shape = (len(units), model.num_moe_layers, deployment.num_slots)
        mean_BLS = rng.lognormal(0.0, SIGMA, shape)
        pairs = SEQUENCES * deployment.num_ranks * model.gate.num_experts_per_token
        mean_BLS *= pairs / mean_BLS.sum(axis=-1, keepdims=True)
        self._mean_BLS = mean_BLS.astype(np.float32)
        self._spread_BLS = np.sqrt(self._mean_BLS)
        self._rng = rng

    def counts(self, steps: int) -> Array:
        """Of `steps` steps one after the other: [steps x units, L, S]."""
        shape = (steps, *self._mean_BLS.shape)
        counts = self._rng.standard_normal(shape, dtype=np.float32)
        counts *= self._spread_BLS
        counts += self._mean_BLS
        np.maximum(counts, 0.0, out=counts)
        return counts.reshape(-1, *self._mean_BLS.shape[1:])


def run(seconds: float = 2.0) -> dict[str, Any]:
    """{"results": {size: {"ranks", "layers", "cores", "steps_per_s", "steps_per_s_with_counts",
    "peak_bytes"}}}; each rate measured for about so long. peak_bytes is the process's so far."""
    return {
        "kind": "bench_simulator",
        "results": {name: _measure(size, seconds) for name, size in SIZES.items()},
    }


def _measure(size: Size, seconds: float) -> dict[str, Any]:
    deployment = size.deployment
    parts = [_Part(size, units) for units in _blocks(size)]
    rates = {}
    with ThreadPoolExecutor(size.cores) as pool:
        for key, draw in (("steps_per_s", False), ("steps_per_s_with_counts", True)):
            list(pool.map(lambda part: part.go(True), parts))  # warm: curves, memory
            steps, start = 0, perf_counter()
            while (elapsed := perf_counter() - start) < seconds:
                list(pool.map(lambda part, draw=draw: part.go(draw), parts))
                steps += parts[0].steps
            rates[key] = steps / elapsed
    return {
        "ranks": size.num_ranks,
        "layers": deployment.model.num_moe_layers,
        "cores": size.cores,
        **rates,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


class _Part:
    """Some units of a cluster, or all of its steps: what one thread computes at a time."""

    def __init__(self, size: Size, units: range) -> None:
        self._model = CostModel(size.deployment, Calibration.named("h100-published"))
        self._loads = Loads(size.deployment, units)
        self._work = StepWork.decode([[SEQUENCES]], [[CONTEXT]])
        self.steps = max(1, BLOCK // len(units))
        self._counts = self._loads.counts(self.steps)

    def go(self, draw: bool) -> float:
        if draw:
            self._counts = self._loads.counts(self.steps)
        return float(self._model.step(self._work, self._counts).total_B.max())


def _blocks(size: Size) -> Iterator[range]:
    for first in range(0, size.units, BLOCK):
        yield range(first, min(first + BLOCK, size.units))
