"""Decoding by expert and by tensor parallelism: time per token at every batch that memory allows.

Batches are sequences per rank, whatever holds them: a group of T ranks under tensor parallelism works
on T times as many at once. All sequences have the same context, experts the loads of one seeded
workload. Expert parallelism: attention is data-parallel, experts are placed by the planner from past
steps, every step's tokens divided over the copies as well as they can, and each batch runs in one part
or in two overlapping ones, whichever is faster.

B steps, L expert layers, E experts, S slots of all ranks, D replicas.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cluster.model.config import ModelConfig
from router.load import LoadWindow
from router.planner import plan
from simulations.balance.divisions import ResplitDivision
from simulations.balance.expert_loads import SHARES, DrawnLoads
from simulations.balance.load_shares import LoadShape, Workload, make_shares
from simulations.balance.sampled_traffic import SampledTraffic, sends_of
from simulations.claims.tensor_parallel import TensorParallel
from simulations.cost import CostModel, Sends, StepWork
from simulations.deployment import Deployment, Overlap
from simulations.hardware.calibration import Calibration
from simulations.memory import DoesNotFit, rank_memory

Array = NDArray[Any]

PAST_STEPS, STEPS = 16, 4
SAMPLED_TOKENS = 512
PER_OCTAVE = 2


@dataclass(frozen=True, kw_only=True, eq=False)
class Curve:
    """tokens_per_rank: decoding sequences per rank, ascending; tpot_s: seconds per step, of each.

    Figures between the points are interpolated; beyond them they are NaN.
    """

    tokens_per_rank: Array
    tpot_s: Array

    @property
    def throughput(self) -> Array:
        """Tokens per second and rank."""
        return np.asarray(self.tokens_per_rank / self.tpot_s)

    def tpot_at(self, tokens_per_rank: float) -> float:
        return _between(tokens_per_rank, self.tokens_per_rank, self.tpot_s)

    def tpot_at_throughput(self, throughput: float) -> float:
        """The least time per token at which so many tokens per second and rank come out; less than
        the first point gives comes out as fast as that."""
        reached = np.maximum.accumulate(self.throughput)
        return _between(max(throughput, float(reached[0])), reached, self.tpot_s)

    def throughput_within(self, tpot_s: float) -> float:
        """The most tokens per second and rank with at most so much time per token; 0 for none."""
        if tpot_s < self.tpot_s[0]:
            return 0.0
        within = self.throughput[self.tpot_s <= tpot_s].max()
        here = np.interp(tpot_s, self.tpot_s, self.tokens_per_rank) / tpot_s
        return float(max(within, here) if tpot_s <= self.tpot_s[-1] else within)


class ExpertParallel:
    """A cluster whose experts were divided once for each batch, and then priced at any context."""

    def __init__(self, deployment: Deployment, workload: Workload, seed: int) -> None:
        self.deployment, self._workload, self._seed = deployment, workload, seed
        self.warnings: list[str] = []
        self._divided: dict[int, tuple[Array, Sends]] = {}

    def curve(self, calibration: Calibration, context: int) -> Curve:
        """Raises DoesNotFit if not even one sequence per rank does."""
        overlaps: tuple[Overlap, ...] = (
            ("none", "two_batch") if calibration.supports_two_batch else ("none",)
        )
        models = [
            CostModel(replace(self.deployment, overlap=overlap), calibration)
            for overlap in overlaps
        ]
        per_replica = self.deployment.topology.tensor_parallel_size

        def fits(tokens: int) -> None:
            of_replica = tokens * per_replica
            rank_memory(
                self.deployment,
                calibration,
                max_tokens=of_replica,
                kv_tokens=of_replica * context,
            )

        def seconds(tokens: int) -> float:
            slot_BLS, sends = self._of_batch(tokens)
            work = StepWork.decode(np.full((1, 1), tokens * per_replica), context)
            return min(float(cost.step(work, slot_BLS, sends).total_B.mean()) for cost in models)

        curve = _curve(fits, seconds, 1)
        for warning in [warning for cost in models for warning in cost.warnings]:
            if warning not in self.warnings:
                self.warnings.append(warning)
        return curve

    def _of_batch(self, tokens: int) -> tuple[Array, Sends]:
        """Tokens of each slot in some steps, [B, L, S], and how far tokens travel."""
        if tokens not in self._divided:
            self._divided[tokens] = self._divide(tokens)
        return self._divided[tokens]

    def _divide(self, tokens: int) -> tuple[Array, Sends]:
        deployment, topology = self.deployment, self.deployment.topology
        loads = _loads(deployment.model, self._workload, tokens * topology.world_size, self._seed)
        window = LoadWindow(deployment.model.num_moe_layers, deployment.model.num_experts)
        for counts_LE in loads.counts(0, PAST_STEPS).sum(axis=1):
            window.add(counts_LE)
        placement = plan(
            window.estimate(),
            num_ranks=topology.world_size,
            slots_per_rank=deployment.slots_per_rank,
            ranks_per_node=topology.ranks_per_node,
        ).placement
        division = ResplitDivision()
        division.follow(placement, range(placement.num_layers))
        per_rank = -(-SAMPLED_TOKENS // topology.world_size)
        source_T = np.repeat(np.arange(topology.world_size), per_rank)
        traffic = SampledTraffic(deployment)
        sampled = [
            traffic.of_layer(division.choose(layer, ids_TK, source_T), source_T)
            for layer, ids_TK in enumerate(loads.rows(PAST_STEPS, len(source_T))[0])
        ]
        slot_BLS = division.slots(loads.counts(PAST_STEPS, PAST_STEPS + STEPS))
        return slot_BLS, sends_of(sampled)


def tensor_parallel_curve(
    group: TensorParallel, context: int, workload: Workload, seed: int
) -> Curve:
    """Raises DoesNotFit if not even one sequence does."""

    def fits(tokens: int) -> None:
        group.memory(max_tokens=tokens, kv_tokens=tokens * context)

    def seconds(tokens: int) -> float:
        loads = _loads(group.model, workload, tokens, seed)
        counts_BLE = loads.counts(PAST_STEPS, PAST_STEPS + STEPS)[:, 0]
        work = StepWork.decode(np.full((1, 1), tokens), context)
        return float(group.step(work, counts_BLE).total_B.mean())

    return _curve(fits, seconds, group.size)


def _loads(model: ModelConfig, workload: Workload, tokens: int, seed: int) -> DrawnLoads:
    """The same shares of experts, whoever serves them."""
    shape = LoadShape(num_layers=model.num_moe_layers, num_experts=model.num_experts, num_nodes=1)
    shares = make_shares(workload, shape, [seed, SHARES])
    return DrawnLoads(shares, model.gate, tokens=tokens, jitter=workload.jitter, seed=[seed])


def _curve(
    fits: Callable[[int], None], seconds: Callable[[int], float], ranks_per_batch: int
) -> Curve:
    batches = batches_up_to(most_that_fits(fits))
    return Curve(
        tokens_per_rank=np.array(batches) / ranks_per_batch,
        tpot_s=np.array([seconds(tokens) for tokens in batches]),
    )


def most_that_fits(fits: Callable[[int], None]) -> int:
    """The largest number that `fits` does not refuse; its refusal of 1 comes through."""
    fits(1)
    low, high = 1, 2
    while _accepted(fits, high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if _accepted(fits, middle) else (low, middle)
    return low


def _accepted(fits: Callable[[int], None], number: int) -> bool:
    try:
        fits(number)
    except DoesNotFit:
        return False
    return True


def batches_up_to(most: int) -> Sequence[int]:
    """1, 2, 3, 4, 6, 8, ... two in each octave, and the most."""
    octaves = np.arange(PER_OCTAVE * np.log2(most) + 1) / PER_OCTAVE
    below = np.round(2.0**octaves).astype(int)
    return sorted({*below[below < most].tolist(), most})


def _between(x: float, known_x: Array, known_y: Array) -> float:
    return float(np.interp(x, known_x, known_y, left=np.nan, right=np.nan))
