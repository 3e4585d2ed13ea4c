"""Which experts tokens ask for: popular ones and others, and each step a little differently.

L expert layers, E logical experts, B steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
_SHARES, _STEPS = 11, 12  # streams of random numbers


@dataclass(frozen=True, kw_only=True)
class Demand:
    """Lognormal popularity, as in the measurements of balance (`simulations/workload.py`).

    skew: standard deviation of the logarithm of an expert's popularity. jitter: that of a step's own
    factor on it. shift_every_s: popularity is drawn anew so often, as when traffic changes its
    subject; infinity: never.
    """

    num_layers: int
    num_experts: int
    skew: float = 1.0
    jitter: float = 0.2
    shift_every_s: float = math.inf
    seed: int = 0

    def __post_init__(self) -> None:
        if not (0 <= self.skew <= 5 and 0 <= self.jitter <= 5):
            raise ValueError(
                f"skew and jitter must be from 0 to 5, got {self.skew:g} and {self.jitter:g}"
            )
        if not self.shift_every_s > 0:
            raise ValueError(f"subjects must last longer than 0 s, got {self.shift_every_s:g} s")

    def subject(self, now_s: float) -> int:
        """Number of the popularity in force."""
        return int(now_s // self.shift_every_s)

    def shares_LE(self, subject: int) -> FloatArray:
        """Of a layer's (token, expert) pairs; the sum of each row is 1."""
        return _shares(self, subject)

    def draw(self, subject: int, num_pairs: int, num_steps: int, stream: int) -> IntArray:
        """[B, L, E]: pairs of each expert in steps with `num_pairs` pairs; `stream` tells draws apart."""
        rng = np.random.default_rng([self.seed, _STEPS, subject, num_pairs, stream])
        mean_LE = self.shares_LE(subject)
        drawn_BLE = mean_LE * np.exp(
            self.jitter * rng.standard_normal((num_steps, *mean_LE.shape), dtype=np.float32)
        )
        return rng.multinomial(num_pairs, drawn_BLE / drawn_BLE.sum(axis=-1, keepdims=True))


@lru_cache(maxsize=4)
def _shares(demand: Demand, subject: int) -> FloatArray:
    rng = np.random.default_rng([demand.seed, _SHARES, subject])
    popularity_LE = np.exp(
        demand.skew * rng.standard_normal((demand.num_layers, demand.num_experts))
    )
    shares_LE: FloatArray = popularity_LE / popularity_LE.sum(axis=1, keepdims=True)
    return shares_LE
