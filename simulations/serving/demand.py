"""Which experts the tokens of the serving cluster ask for, step by step.

The workloads are those of `simulate balance` (`simulations/balance/load_shares.py`). Where they tell nodes
apart, all nodes' tokens are taken together.

L expert layers, E logical experts, B steps.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from router.gate import GateConfig
from simulations.balance.expert_loads import COUNTS, SHARES, counts_of
from simulations.balance.load_shares import LoadShape, Workload, limited, make_shares

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
DRIFT_REFRESH_STEPS = 25
"""A drift is followed in strides of so many steps, in which the log loads keep more than
rho^(1/4) of their correlation."""


class Demand:
    """`advance` to a step, then `draw` steps of the popularity there."""

    def __init__(self, workload: Workload, shape: LoadShape, gate: GateConfig, seed: int) -> None:
        self.num_layers, self.num_experts = shape.num_layers, shape.num_experts
        self._workload, self._seed = workload, seed
        self._shares = make_shares(workload, shape, [seed, SHARES])
        self._most = 1 / gate.num_experts_per_token
        self._every = {
            "drift": DRIFT_REFRESH_STEPS,
            "burst": workload.shift_every,
            "task_shift": workload.shift_every,
        }.get(workload.name)
        self._epoch = -1
        self.advance(0)

    def advance(self, step: int) -> bool:
        """Whether popularity has changed. Steps are asked for in ascending order."""
        epoch = step // self._every if self._every else 0
        if epoch == self._epoch:
            return False
        self._epoch = epoch
        load_OLE = self._shares.at(step)
        self.mean_LE: FloatArray = (load_OLE / load_OLE.sum(axis=2, keepdims=True)).mean(axis=0)
        return True

    def draw(self, num_pairs: int, num_steps: int, number: int) -> IntArray:
        """[B, L, E]: pairs of each expert in steps with `num_pairs` pairs; the `number`-th such draw."""
        rng = np.random.default_rng([self._seed, COUNTS, self._epoch, num_pairs, number])
        noise_BLE = rng.standard_normal((num_steps, *self.mean_LE.shape))
        load_BLE = self.mean_LE * np.exp(self._workload.jitter * noise_BLE)
        return counts_of(rng, num_pairs, limited(load_BLE, self._most))
