"""How the load of experts is shared, step by step: the seeded workloads of `simulate balance`.

    uniform      all experts alike
    lognormal    log-sd `skew`, one draw for the whole run
    zipf         rank^-`skew`, in an order of its own in every layer
    burst        lognormal (log-sd `skew`), but one expert in every token's choice; every `shift_every`
                 steps it is another one
    two_topic    0.7 and 0.3 of two lognormal loads (log-sd `skew`)
    drift        log loads are AR(1) with standard deviation `skew` and correlation `rho` over 100 steps
    task_shift   lognormal (log-sd `skew`), drawn anew every `shift_every` steps: another task
    node_skew    a part `skew` of each node's tokens follows a lognormal load of its own, the others
                 one of all nodes (log-sd 1 both)

On top of each, every batch's loads vary by a lognormal factor per expert (log-sd `jitter`). An expert
is chosen by a token once at most, so no share exceeds 1 / top_k.

O origins: groups of nodes whose tokens choose alike; one, or one per node. L layers, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]

DRIFT_STEPS = 100
_HOT = 2.0
"""Of a burst's expert, before shares are limited to 1 / top_k: more than all others together."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """`skew` None: the workload's usual one. Raises ValueError for what cannot be."""

    name: str = "lognormal"
    skew: float | None = None
    jitter: float = 0.1
    rho: float = 0.99
    shift_every: int = 500

    def __post_init__(self) -> None:
        if self.name not in WORKLOADS:
            raise ValueError(f"unknown workload {self.name!r}: choose from {', '.join(WORKLOADS)}")
        if self.skew is None:
            object.__setattr__(self, "skew", WORKLOADS[self.name][1])
        most = 1.0 if self.name == "node_skew" else 5.0
        for name, value, high in (("skew", self.skew, most), ("jitter", self.jitter, 2.0)):
            if value is None or not 0 <= value <= high:
                raise ValueError(f"{name} must be from 0 to {high:g}, got {value}")
        if not 0 <= self.rho <= 1 or self.shift_every < 1:
            raise ValueError(
                f"rho({self.rho}) must be from 0 to 1 and shift_every({self.shift_every}) >= 1"
            )

    @property
    def spread(self) -> float:
        """The skew, which __post_init__ has filled in."""
        assert self.skew is not None
        return self.skew


@dataclass(frozen=True, kw_only=True)
class LoadShape:
    """Of the arrays: `num_origins` are wanted if the workload tells nodes apart."""

    num_layers: int
    num_experts: int
    num_nodes: int


class Shares(Protocol):
    """[O, L, E] relative loads of a step, of any sum; steps are asked for in ascending order."""

    def at(self, step: int) -> FloatArray: ...


def make_shares(workload: Workload, shape: LoadShape, seed: list[int]) -> Shares:
    """The workload's process; equal arguments give equal shares."""
    return WORKLOADS[workload.name][0](workload, shape, seed)


class _Redrawn:
    """Loads that are drawn anew every so many steps."""

    def __init__(
        self,
        draw: Callable[[np.random.Generator, LoadShape], FloatArray],
        shape: LoadShape,
        seed: list[int],
        every: int | None = None,
    ) -> None:
        self._draw, self._shape, self._seed, self._every = draw, shape, seed, every
        self._number, self._load = -1, np.empty(0)

    def at(self, step: int) -> FloatArray:
        number = step // self._every if self._every else 0
        if number != self._number:
            rng = np.random.default_rng([*self._seed, number])
            self._number, self._load = number, self._draw(rng, self._shape)
        return self._load


class _Burst:
    """A hot expert of each layer, on top of a load that stays."""

    def __init__(self, workload: Workload, shape: LoadShape, seed: list[int]) -> None:
        self._rest = _Redrawn(_lognormal(workload.spread), shape, [*seed, 0])
        self._hot = _Redrawn(_one_each, shape, [*seed, 1], workload.shift_every)

    def at(self, step: int) -> FloatArray:
        rest = self._rest.at(step)
        load: FloatArray = rest + _HOT * rest.sum(axis=2, keepdims=True) * self._hot.at(step)
        return load


class _Drift:
    """Log loads that follow AR(1)."""

    def __init__(self, workload: Workload, shape: LoadShape, seed: list[int]) -> None:
        self._rng = np.random.default_rng(seed)
        self._spread, self._rho = workload.spread, workload.rho ** (1 / DRIFT_STEPS)
        self._step, self._log = 0, self._rng.standard_normal(_size(shape))

    def at(self, step: int) -> FloatArray:
        while self._step < step:
            noise = self._rng.standard_normal(self._log.shape)
            self._log = self._rho * self._log + np.sqrt(1 - self._rho**2) * noise
            self._step += 1
        load: FloatArray = np.exp(self._spread * self._log)
        return load


class _NodeSkew:
    """A load of all nodes, and of each its own."""

    def __init__(self, workload: Workload, shape: LoadShape, seed: list[int]) -> None:
        common, own = _lognormal(1.0), _lognormal(1.0, own=True)
        self._common = _normal(_Redrawn(common, shape, [*seed, 0]).at(0))
        self._own = _normal(_Redrawn(own, shape, [*seed, 1]).at(0))
        self._part = workload.spread

    def at(self, step: int) -> FloatArray:
        return (1 - self._part) * self._common + self._part * self._own


def _size(shape: LoadShape, own: bool = False) -> tuple[int, int, int]:
    return (shape.num_nodes if own else 1, shape.num_layers, shape.num_experts)


def _normal(load: FloatArray) -> FloatArray:
    share: FloatArray = load / load.sum(axis=2, keepdims=True)
    return share


def _lognormal(
    spread: float, own: bool = False
) -> Callable[[np.random.Generator, LoadShape], FloatArray]:
    return lambda rng, shape: rng.lognormal(0.0, spread, _size(shape, own))


def _zipf(exponent: float) -> Callable[[np.random.Generator, LoadShape], FloatArray]:
    def draw(rng: np.random.Generator, shape: LoadShape) -> FloatArray:
        load_E = np.arange(1, shape.num_experts + 1) ** -exponent
        return rng.permuted(np.broadcast_to(load_E, _size(shape)), axis=2)

    return draw


def _two_topics(spread: float) -> Callable[[np.random.Generator, LoadShape], FloatArray]:
    def draw(rng: np.random.Generator, shape: LoadShape) -> FloatArray:
        first, second = (_normal(rng.lognormal(0.0, spread, _size(shape))) for _ in range(2))
        return 0.7 * first + 0.3 * second

    return draw


def _one_each(rng: np.random.Generator, shape: LoadShape) -> FloatArray:
    """1 for one expert of each layer."""
    hot = np.zeros(_size(shape))
    hot[:, np.arange(shape.num_layers), rng.integers(shape.num_experts, size=shape.num_layers)] = 1
    return hot


Make = Callable[[Workload, LoadShape, list[int]], Shares]

WORKLOADS: dict[str, tuple[Make, float]] = {
    "lognormal": (lambda w, shape, seed: _Redrawn(_lognormal(w.spread), shape, seed), 1.0),
    "zipf": (lambda w, shape, seed: _Redrawn(_zipf(w.spread), shape, seed), 1.0),
    "burst": (_Burst, 0.3),
    "two_topic": (lambda w, shape, seed: _Redrawn(_two_topics(w.spread), shape, seed), 1.2),
    "uniform": (lambda w, shape, seed: _Redrawn(_lognormal(0.0), shape, seed), 0.0),
    "drift": (_Drift, 1.0),
    "task_shift": (
        lambda w, shape, seed: _Redrawn(_lognormal(w.spread), shape, seed, w.shift_every),
        1.0,
    ),
    "node_skew": (_NodeSkew, 0.5),
}
"""How each is made, and its usual skew."""


def limited(share: FloatArray, most: float) -> FloatArray:
    """Shares [..., E] of sum 1, none above `most`: what exceeds it goes to all others in proportion."""
    share = share / share.sum(axis=-1, keepdims=True)
    over = share.max(axis=-1) > most * (1 + 1e-12)
    while over.any():
        rows = share[over]
        full = rows >= most
        others = np.where(full, 0.0, rows)
        left = 1.0 - most * full.sum(axis=-1, keepdims=True)
        scale = left / np.maximum(others.sum(axis=-1, keepdims=True), np.finfo(float).tiny)
        share[over] = np.where(full, most, others * scale)
        over = share.max(axis=-1) > most * (1 + 1e-12)
    return share
