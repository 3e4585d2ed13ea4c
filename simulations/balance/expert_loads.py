"""A workload as a stream of batches: how many tokens each expert gets, and some tokens' choices.

Counts are drawn per layer as a multinomial of the step's shares: as of tokens that choose
independently of each other, but for the rule that a token chooses an expert once, which makes counts
vary slightly less (variance times 1 - top_k * share instead of 1 - share). Large batches take the
normal approximation, which is many times faster. Every step has a generator of its own: a batch does
not depend on how steps are asked for.

B steps, O origins (groups of nodes whose tokens choose alike, 1 or all nodes), L layers, E experts,
M sampled tokens of an origin, K experts per token.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from router.gate import GateConfig
from router.placement import IntArray
from simulations.balance.load_shares import (
    FloatArray,
    LoadShape,
    Shares,
    Workload,
    limited,
    make_shares,
)
from simulations.balance.token_rows import sample_rows

Rows = NDArray[np.integer[Any]]

MANY = 64
"""Choices for each expert, in the mean, from which on the normal approximation is taken."""
COUNTS, ROWS, SHARES = range(3)
"""What a generator is for: part of its seed."""


class ExpertLoads(Protocol):
    """Steps are asked for in ascending order, from 0. num_origins: 1, or as many as nodes."""

    num_origins: int

    def counts(self, start: int, stop: int) -> IntArray:
        """[B, O, L, E]: (token, expert) pairs of each step's batch, equally many for each origin."""

    def rows(self, step: int, num_tokens: int) -> Rows:
        """ids [O, L, M, K] of so many tokens for each origin, as they are at that step; -1 = none."""


class DrawnLoads:
    """Batches drawn from shares. tokens: of a batch, all ranks together; jitter: log-sd by which each
    expert's load varies from batch to batch, drawn for every origin apart.

    Raises ValueError for tokens that do not divide over the origins.
    """

    def __init__(
        self, shares: Shares, gate: GateConfig, *, tokens: int, jitter: float, seed: list[int]
    ) -> None:
        self._shares, self._gate = shares, gate
        self._jitter, self._seed = jitter, seed
        self.num_origins = len(shares.at(0))
        self._pairs = tokens_of_origin(tokens, self.num_origins) * gate.num_experts_per_token

    def counts(self, start: int, stop: int) -> IntArray:
        return np.stack([self._batch(step) for step in range(start, stop)])

    def rows(self, step: int, num_tokens: int) -> Rows:
        rng = np.random.default_rng([*self._seed, ROWS, step])
        return sample_rows(rng, self._shares.at(step), self._gate, num_tokens)

    def _batch(self, step: int) -> IntArray:
        rng = np.random.default_rng([*self._seed, COUNTS, step])
        load_OLE = self._shares.at(step)
        if self._jitter:
            noise_OLE = rng.standard_normal(load_OLE.shape, dtype=np.float32)
            load_OLE = load_OLE * np.exp(np.float32(self._jitter) * noise_OLE)
        return counts_of(rng, self._pairs, limited(load_OLE, 1 / self._gate.num_experts_per_token))


def counts_of(rng: np.random.Generator, pairs: int, share: FloatArray) -> IntArray:
    """Of `pairs` independent choices how many fall on each expert, [..., E] like `share`, of sum 1.

    With many to an expert: (sqrt(m) + z / 2)^2 - 1/4 for a mean m and a normal z has a Poisson count's
    mean, variance (+ 1/8) and sign (Anscombe 1948); taking from each its part of what all are too many
    makes of Poisson counts multinomial ones. Rounded, the largest takes what rounding leaves over.
    """
    if pairs < MANY * share.shape[-1]:
        return rng.multinomial(pairs, share)
    root = np.sqrt(pairs * share, dtype=np.float32)
    root += np.float32(0.5) * rng.standard_normal(share.shape, dtype=np.float32)
    count = root * root - np.float32(0.25)
    count -= (count.sum(axis=-1, keepdims=True, dtype=np.float64) - pairs) * share
    counts = np.maximum(np.rint(count), 0).astype(np.int64)
    left = pairs - counts.sum(axis=-1, keepdims=True)
    first = share.argmax(axis=-1, keepdims=True)
    np.put_along_axis(counts, first, np.take_along_axis(counts, first, axis=-1) + left, axis=-1)
    return counts


class SyntheticLoads(DrawnLoads):
    """Batches of a seeded workload."""

    def __init__(
        self,
        workload: Workload,
        shape: LoadShape,
        gate: GateConfig,
        *,
        tokens: int,
        seed: list[int],
    ) -> None:
        shares = make_shares(workload, shape, [*seed, SHARES])
        super().__init__(shares, gate, tokens=tokens, jitter=workload.jitter, seed=seed)


def tokens_of_origin(tokens: int, num_origins: int) -> int:
    """Of a batch; ValueError where they do not divide."""
    if left := tokens % num_origins:
        raise ValueError(
            f"tokens of a step must divide over nodes: {tokens} % {num_origins} = {left}"
        )
    return tokens // num_origins
