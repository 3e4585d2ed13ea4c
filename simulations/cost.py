"""The time of a step, of many steps at once: operations, experts, exchanges, and what overlaps.

Ranks meet in every dispatch and combine, so each part of a layer takes as long as on its slowest
rank; `layer_times.py` makes layers of the parts.

Steps are cheapest in blocks: 16 of 64 ranks or more take a fifth of the time of 16 calls. A StepWork
that is used again is not computed again.

B steps, D replicas of the attention, L expert layers, S slots of all ranks, R ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simulations.deployment import Deployment
from simulations.hardware.calibration import Calibration
from simulations.times.exchange_times import ExchangeTimes
from simulations.times.expert_times import ExpertTimes
from simulations.times.group_sums import group_sums
from simulations.times.layer_times import LayerTimes, Parts, in_turn, two_batches
from simulations.times.op_times import OpTimes
from simulations.times.step_work import Sends, StepWork
from simulations.times.work_times import WorkTimes

__all__ = ["CostModel", "LayerTimes", "Sends", "StepTimes", "StepWork"]

Array = NDArray[Any]


@dataclass(frozen=True, kw_only=True, eq=False)
class StepTimes:
    """Seconds [B]: total = layers + dense + head + overhead. `experts_by_rank_BLR` on request."""

    total_B: Array
    layers: LayerTimes
    dense_B: Array
    head_B: Array
    overhead_B: Array
    experts_by_rank_BLR: Array | None = None


class CostModel:
    """`warnings`: what had to be extrapolated, each thing once.

    Raises ValueError for a deployment that the calibration does not cover.
    """

    def __init__(self, deployment: Deployment, calibration: Calibration) -> None:
        self._two_batch = deployment.overlap == "two_batch"
        if self._two_batch and not calibration.supports_two_batch:
            raise ValueError(
                f"calibration {calibration.name} is of a backend without two-batch overlap: "
                'choose overlap "none"'
            )
        self._num_parts = 2 if self._two_batch else 1
        self.deployment, self.calibration = deployment, calibration
        self.warnings: list[str] = []
        self._ops = OpTimes(deployment, calibration, self._warn)
        self._experts = ExpertTimes(deployment, calibration, self._warn, self._num_parts)
        self._exchanges = ExchangeTimes(deployment, calibration)
        self._uniform = Sends.uniform(deployment.model, deployment.topology)
        self._last: tuple[StepWork, WorkTimes] | None = None
        self._check("ranks", np.array(deployment.num_ranks))

    def experts_seconds(self, slot_tokens_BLS: Array) -> Array:
        """Of each rank's routed experts, float32 [B, L, R]."""
        return self._experts.by_rank(slot_tokens_BLS)

    def exchange_seconds(
        self, rank_tokens_BLR: Array, sends: Sends | None, source_tokens_BR: Array
    ) -> tuple[Array, Array]:
        """Of dispatch and combine, [B, L] each; `sends` None: uniform routing."""
        return self._exchanges.both(rank_tokens_BLR, sends or self._uniform, source_tokens_BR)

    def step(
        self,
        work: StepWork,
        slot_tokens_BLS: Array,
        sends: Sends | None = None,
        *,
        by_rank: bool = False,
    ) -> StepTimes:
        """Time of B steps with (token, expert) pairs `slot_tokens_BLS` of each slot.

        Raises ValueError for pairs of another number of layers or slots than the deployment's.
        """
        self._check_slots(slot_tokens_BLS)
        times = self._times_of(work)
        experts_BLR = self._experts.by_rank(slot_tokens_BLS)
        layers = self._layers(work, times, slot_tokens_BLS, experts_BLR.max(axis=-1), sends)
        model = self.deployment.model
        dense_B = (model.num_layers - model.num_moe_layers) * times.dense[:, 0]
        head_B = times.head[:, 0]
        gaps = self.calibration.layer_s * model.num_layers
        overhead = self.calibration.step_s + gaps * self._num_parts
        total_B = layers.total.sum(axis=-1, dtype=np.float64) + (dense_B + head_B + overhead)
        return StepTimes(
            total_B=total_B,
            layers=layers,
            dense_B=np.broadcast_to(dense_B, total_B.shape),
            head_B=np.broadcast_to(head_B, total_B.shape),
            overhead_B=np.full(total_B.shape, overhead),
            experts_by_rank_BLR=experts_BLR if by_rank else None,
        )

    def _layers(
        self,
        work: StepWork,
        times: WorkTimes,
        slot_tokens_BLS: Array,
        experts_BL: Array,
        sends: Sends | None,
    ) -> LayerTimes:
        rank_tokens_BLR = group_sums(slot_tokens_BLS, self.deployment.slots_per_rank)
        rank_tokens_BLR /= self._num_parts
        dispatch, combine = self.exchange_seconds(rank_tokens_BLR, sends, times.source_tokens_BR)
        parts = Parts(
            before=times.before,
            rest=times.rest,
            gate=times.gate,
            shared=times.shared,
            dispatch=dispatch,
            experts=experts_BL / np.float32(self._num_parts),
            combine=combine,
        )
        if not self._two_batch:
            return in_turn(parts)
        if self.deployment.dispatcher == "low_latency":
            held_s = self.calibration.held_s
            return two_batches(parts, held_s=held_s, has_prompts=work.has_prompts)
        shared = parts.sharing(self.calibration)
        return two_batches(shared, held_s=0.0, has_prompts=work.has_prompts)

    def _times_of(self, work: StepWork) -> WorkTimes:
        if self._last is None or self._last[0] is not work:
            self._check("tokens", work.tokens_BD)
            self._check("context", work.context_BD)
            topology, two_batch = self.deployment.topology, self._two_batch
            self._last = work, WorkTimes.of(work, self._ops, topology, two_batch=two_batch)
        return self._last[1]

    def _check_slots(self, slot_tokens_BLS: Array) -> None:
        wanted = (self.deployment.model.num_moe_layers, self.deployment.num_slots)
        if slot_tokens_BLS.ndim != 3 or slot_tokens_BLS.shape[1:] != wanted:
            raise ValueError(
                f"slot_tokens must be [B, {wanted[0]} layers, {wanted[1]} slots], got "
                f"{list(slot_tokens_BLS.shape)}"
            )

    def _check(self, what: str, sizes: Array) -> None:
        sizes = sizes[sizes > 0]
        if sizes.size and (
            warning := self.calibration.outside(what, float(sizes.min()), float(sizes.max()))
        ):
            self._warn(warning)

    def _warn(self, warning: str) -> None:
        if warning not in self.warnings:
            self.warnings.append(warning)
