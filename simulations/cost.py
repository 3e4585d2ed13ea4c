"""The time of a step, of many steps at once: operations, experts, exchanges, and what overlaps.

Ranks meet in every dispatch and combine, so each part of a layer takes as long as on its slowest
rank, and a layer is the sum of its parts. With two micro-batches (`overlap` "two_batch", after
DeepSeek-V3's published profiles; A attention before and after its core's start, Sh shared expert, G
gate, M routed experts, D dispatch, C combine, all of half the tokens) it is

    decode    2 [ max(Sh + A0 + h, D) + M + max(A1 + G + h, C) ]
    prompts   max(A + Sh, C) + max(A, D) + max(M, D) + max(M + Sh, C)       A with the gate

where computation is slowed by the computing units that the exchange's kernels hold, and these by
sharing the machine. "low_latency" kernels hold all units, but only for the seconds h in which they
send and receive, and none while messages fly.

B steps, D replicas of the attention, L expert layers, S slots of all ranks, R ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simulations.deployment import Deployment
from simulations.exchange_times import ExchangeTimes
from simulations.expert_times import ExpertTimes
from simulations.group_sums import group_sums
from simulations.hardware.calibration import Calibration
from simulations.op_times import OpTimes
from simulations.step_work import Sends, StepWork

__all__ = ["CostModel", "LayerTimes", "Sends", "StepTimes", "StepWork"]

Array = NDArray[Any]


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerTimes:
    """Seconds [B, L] of the expert layers' parts, both micro-batches together.

    exposed + hidden = dispatch + combine; what a layer takes is `total`.
    """

    attention: Array
    gate: Array
    shared: Array
    dispatch: Array
    experts: Array
    combine: Array
    exposed_BL: Array
    hidden_BL: Array

    @property
    def total(self) -> Array:
        return self.attention + self.gate + self.shared + self.experts + self.exposed_BL


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
        two_batch = self._two_batch = deployment.overlap == "two_batch"
        if two_batch and not calibration.supports_two_batch:
            raise ValueError(
                f"calibration {calibration.name} is of a backend without two-batch overlap: "
                'choose overlap "none"'
            )
        self.deployment, self.calibration = deployment, calibration
        self.warnings: list[str] = []
        self._ops = OpTimes(deployment, calibration, self._warn)
        self._experts = ExpertTimes(deployment, calibration, self._warn, 2 if two_batch else 1)
        self._exchanges = ExchangeTimes(deployment, calibration)
        self._uniform = Sends.uniform(deployment.model, deployment.topology)
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
        self._check("tokens", work.tokens_BD)
        self._check("context", work.context_BD)
        experts_BLR = self._experts.by_rank(slot_tokens_BLS)
        layers = self._layers(work, slot_tokens_BLS, experts_BLR.max(axis=-1), sends)
        model = self.deployment.model
        num_dense = model.num_layers - model.num_moe_layers
        dense_B = num_dense * self._slowest(self._ops.attention(work) + self._ops.dense(work))[:, 0]
        head_B = self._slowest(self._ops.head(work))[:, 0]
        gaps = self.calibration.layer_s * model.num_layers
        overhead = self.calibration.step_s + gaps * (2 if self._two_batch else 1)
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
        self, work: StepWork, slot_tokens_BLS: Array, experts_BL: Array, sends: Sends | None
    ) -> LayerTimes:
        two_batch = self.deployment.overlap == "two_batch"
        parts = 2 if two_batch else 1
        part = work.half() if two_batch else work
        ops = self._ops
        before = self._slowest(ops.before_core(part))
        rest = self._slowest(ops.core(part) + ops.after_core(part))
        gate, shared = self._slowest(ops.gate(part)), self._slowest(ops.shared(part))
        rank_tokens_BLR = group_sums(slot_tokens_BLS, self.deployment.slots_per_rank)
        dispatch, combine = self.exchange_seconds(
            rank_tokens_BLR / parts, sends, self._source_tokens(part)
        )
        experts = experts_BL / np.float32(parts)
        slower = 1.0
        held = 0.0
        if two_batch and self.deployment.dispatcher == "low_latency":
            held = self.calibration.held_s
        elif two_batch:
            slower = 1.0 / (1.0 - self.calibration.sm_share)
            dispatch = dispatch * self.calibration.exchange_slowdown
            combine = combine * self.calibration.exchange_slowdown
        before, rest, gate = before * slower, rest * slower, gate * slower
        shared, experts = shared * slower, experts * np.float32(slower)
        if not two_batch:
            exposed = dispatch + combine
        elif work.has_prompts:
            attention = before + rest + gate
            exposed = _beyond(combine, attention + shared) + _beyond(dispatch, attention)
            exposed = exposed + _beyond(dispatch, experts) + _beyond(combine, experts + shared)
        else:
            exposed = _beyond(dispatch, shared + before, held)
            exposed = 2 * (exposed + _beyond(combine, rest + gate, held))

        def whole(part_seconds: Array) -> Array:
            return np.broadcast_to(part_seconds * parts, experts_BL.shape)

        exchanged = whole(dispatch + combine)
        return LayerTimes(
            attention=whole(before + rest),
            gate=whole(gate),
            shared=whole(shared),
            dispatch=whole(dispatch),
            experts=whole(experts),
            combine=whole(combine),
            exposed_BL=exposed,
            hidden_BL=exchanged - exposed,
        )

    def _source_tokens(self, work: StepWork) -> Array:
        """Tokens that each rank brings to the exchange, [B or 1, R]."""
        topology = self.deployment.topology
        tokens_BD = np.broadcast_to(work.tokens_BD, (len(work.tokens_BD), topology.num_replicas))
        size = topology.tensor_parallel_size
        return np.repeat(tokens_BD / size, size, axis=1)

    @staticmethod
    def _slowest(seconds_BD: Array) -> Array:
        """[B, 1]: over replicas."""
        return np.asarray(seconds_BD.max(axis=-1, keepdims=True))

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


def _beyond(exchange: Array, computation: Array, held: float = 0.0) -> Array:
    """What an exchange adds to the computation beside it: `held` seconds, in which it computes
    itself, or what is left of it when the computation is done."""
    return np.asarray(np.minimum(np.maximum(exchange - computation, held), exchange))
