"""One expert layer, from its parts: in turn, or in two micro-batches under each other's messages.

A attention before (A0) and after (A1) its projections of queries, Sh shared expert, G gate, M routed
experts, D dispatch, C combine. In turn, they add up. In two micro-batches, after DeepSeek-V3's
published profiles, with all of half the tokens:

    decode    2 [ max(Sh + A0 + h, D) + M + max(A1 + G + h, C) ]
    prompts   max(A + Sh, C) + max(A, D) + max(M, D) + max(M + Sh, C)       A with the gate

where computation is slowed by the computing units that the exchange's kernels hold, and these by
sharing the machine. "low_latency" kernels hold all units, but only for the seconds h in which they
send and receive, and none while messages fly.

B steps, L expert layers; arrays may be [B, 1] where layers are alike.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simulations.hardware.calibration import Calibration

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
class Parts:
    """Seconds of a micro-batch's parts, or of a whole batch's, each on its slowest rank."""

    before: Array
    rest: Array
    gate: Array
    shared: Array
    dispatch: Array
    experts: Array
    combine: Array

    def sharing(self, calibration: Calibration) -> Parts:
        """When exchanges hold computing units all the time."""
        slower = 1.0 / (1.0 - calibration.sm_share)
        return replace(
            self,
            before=self.before * slower,
            rest=self.rest * slower,
            gate=self.gate * slower,
            shared=self.shared * slower,
            experts=self.experts * np.float32(slower),
            dispatch=self.dispatch * calibration.exchange_slowdown,
            combine=self.combine * calibration.exchange_slowdown,
        )


def in_turn(parts: Parts) -> LayerTimes:
    return _layer(parts, 1, parts.dispatch + parts.combine)


def two_batches(half: Parts, *, held_s: float, has_prompts: bool) -> LayerTimes:
    """Of one micro-batch's parts; `held_s` is h, of prompts there is none."""
    p = half
    if has_prompts:
        attention = p.before + p.rest + p.gate
        exposed = _beyond(p.combine, attention + p.shared) + _beyond(p.dispatch, attention)
        exposed = exposed + _beyond(p.dispatch, p.experts)
        return _layer(half, 2, exposed + _beyond(p.combine, p.experts + p.shared))
    exposed = _beyond(p.dispatch, p.shared + p.before, held_s)
    return _layer(half, 2, 2 * (exposed + _beyond(p.combine, p.rest + p.gate, held_s)))


def _layer(parts: Parts, number: int, exposed_BL: Array) -> LayerTimes:
    shape = parts.experts.shape

    def whole(seconds: Array) -> Array:
        return np.broadcast_to(seconds * number, shape)

    return LayerTimes(
        attention=whole(parts.before + parts.rest),
        gate=whole(parts.gate),
        shared=whole(parts.shared),
        dispatch=whole(parts.dispatch),
        experts=whole(parts.experts),
        combine=whole(parts.combine),
        exposed_BL=exposed_BL,
        hidden_BL=whole(parts.dispatch + parts.combine) - exposed_BL,
    )


def _beyond(exchange: Array, computation: Array, held_s: float = 0.0) -> Array:
    """What an exchange adds to the computation beside it: `held_s` seconds, in which it computes
    itself, or what is left of it when the computation is done."""
    return np.asarray(np.minimum(np.maximum(exchange - computation, held_s), exchange))
