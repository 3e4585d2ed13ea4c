"""Seeded loads for balance measurements: the same arrays on every machine and in every run.

`planned_loads` draws what plans are made for: five cluster configurations x seven distributions of
load over experts. `jittered` and `served_counts` draw the batches that then arrive, `drifting_loads`
loads that change from step to step.

L layers, E logical experts, S slots of all ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
Draw = Callable[[np.random.Generator, int], FloatArray]

SEED = 20251122
DRIFT_SEED = 7
NUM_LAYERS = 58
"""DeepSeek-V3's layers with experts."""
SCALE = 1e6
"""So that loads stay apart when they are rounded to whole tokens."""


@dataclass(frozen=True, kw_only=True)
class ClusterShape:
    """A model's experts on a cluster's slots; `num_groups` is 1 where groups do not matter."""

    num_experts: int
    num_slots: int
    num_nodes: int
    ranks_per_node: int
    num_groups: int = 1

    @property
    def num_ranks(self) -> int:
        return self.num_nodes * self.ranks_per_node

    @property
    def slots_per_rank(self) -> int:
        return self.num_slots // self.num_ranks


SHAPES = {
    "A": ClusterShape(num_experts=64, num_slots=80, num_nodes=2, ranks_per_node=8),
    "B": ClusterShape(num_experts=256, num_slots=288, num_nodes=4, ranks_per_node=8, num_groups=8),
    "B2": ClusterShape(num_experts=256, num_slots=320, num_nodes=8, ranks_per_node=8, num_groups=8),
    "C": ClusterShape(num_experts=256, num_slots=320, num_nodes=8, ranks_per_node=8),
    "D": ClusterShape(num_experts=128, num_slots=160, num_nodes=4, ranks_per_node=8),
}
"""A: 16 ranks x 5 slots. B, B2, C: DeepSeek-V3's experts, in groups or not. D: Qwen3-MoE's."""


def _zipf(exponent: float) -> Draw:
    return lambda rng, experts: rng.permutation(np.arange(1, experts + 1) ** -exponent)


def _lognormal(rng: np.random.Generator, experts: int) -> FloatArray:
    return rng.lognormal(0.0, 1.0, experts)


def _burst(rng: np.random.Generator, experts: int) -> FloatArray:
    """One expert in every token's choice: with top-8, an eighth of all assignments."""
    load_E = rng.lognormal(0.0, 0.3, experts)
    hot = int(rng.integers(experts))
    load_E[hot] = 0.0
    load_E *= 0.875 / load_E.sum()
    load_E[hot] = 0.125
    return load_E


def _two_topics(rng: np.random.Generator, experts: int) -> FloatArray:
    first_E, second_E = (rng.lognormal(0.0, 1.2, experts) for _ in range(2))
    mixed_E: FloatArray = 0.7 * first_E / first_E.sum() + 0.3 * second_E / second_E.sum()
    return mixed_E


def _uniform(rng: np.random.Generator, experts: int) -> FloatArray:
    return rng.multinomial(524288, np.full(experts, 1 / experts)).astype(np.float64)


WORKLOADS: dict[str, Draw] = {
    "zipf0.6": _zipf(0.6),
    "zipf1.0": _zipf(1.0),
    "zipf1.4": _zipf(1.4),
    "logn1": _lognormal,
    "burst": _burst,
    "two_topic": _two_topics,
    "uniform": _uniform,
}
"""Zipf 1.4 gives one expert more than a top-8 gate can: a stress test, not a model of one."""


def planned_loads(shape: str, workload: str, num_layers: int = NUM_LAYERS) -> FloatArray:
    """[L, E] loads in tokens, of any sum; fewer layers are the first ones of the longer draw."""
    draw, experts = WORKLOADS[workload], SHAPES[shape].num_experts
    rng = np.random.default_rng([SEED, list(WORKLOADS).index(workload), list(SHAPES).index(shape)])
    return np.stack([draw(rng, experts) for _ in range(num_layers)]) * SCALE


def jittered(rng: np.random.Generator, load_E: FloatArray, jitter: float) -> FloatArray:
    """The load of one batch: each expert's times its own lognormal factor, log-sd `jitter`."""
    return load_E * rng.lognormal(0.0, jitter, load_E.shape)


def served_counts(
    rng: np.random.Generator, load_E: FloatArray, jitter: float, num_assignments: int
) -> IntArray:
    """[E]: how many of a batch's (token, expert) pairs each expert gets."""
    batch_E = jittered(rng, load_E, jitter)
    return rng.multinomial(num_assignments, batch_E / batch_E.sum())


def drifting_loads(rho: float, num_layers: int, num_experts: int) -> Iterator[FloatArray]:
    """[L, E] loads of one step after the other, without end.

    Log-loads are AR(1) with standard deviation 1 and correlation `rho` from step to step.
    """
    rng = np.random.default_rng([DRIFT_SEED, int(rho * 1000)])
    log_LE = rng.standard_normal((num_layers, num_experts))
    while True:
        yield np.exp(log_LE) * SCALE
        noise_LE = rng.standard_normal((num_layers, num_experts))
        log_LE = rho * log_LE + np.sqrt(1 - rho**2) * noise_LE
