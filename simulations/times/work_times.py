"""What of a step depends on the replicas' work alone, not on where experts are or who chooses them.

B steps, D replicas of the attention, R ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from comms.topology import Topology
from simulations.times.op_times import OpTimes
from simulations.times.step_work import StepWork

Array = NDArray[Any]


@dataclass(frozen=True, kw_only=True, eq=False)
class WorkTimes:
    """Seconds [B, 1] on the slowest replica.

    before, rest, gate, shared: of one expert layer and one micro-batch. dense: of a whole layer
    without experts. source_tokens_BR: tokens that each rank brings to a micro-batch's exchange.
    """

    before: Array
    rest: Array
    gate: Array
    shared: Array
    dense: Array
    head: Array
    source_tokens_BR: Array

    @staticmethod
    def of(work: StepWork, ops: OpTimes, topology: Topology, *, two_batch: bool) -> WorkTimes:
        part = work.half() if two_batch else work
        before = ops.before_core(part)
        rest = ops.core(part) + ops.after_core(part)
        attention = ops.attention(work) if two_batch else before + rest
        return WorkTimes(
            before=_slowest(before),
            rest=_slowest(rest),
            gate=_slowest(ops.gate(part)),
            shared=_slowest(ops.shared(part)),
            dense=_slowest(attention + ops.dense(work)),
            head=_slowest(ops.head(work)),
            source_tokens_BR=_by_rank(part.tokens_BD, topology),
        )


def _slowest(seconds_BD: Array) -> Array:
    return np.asarray(seconds_BD.max(axis=-1, keepdims=True))


def _by_rank(tokens_BD: Array, topology: Topology) -> Array:
    """[B or 1, R]: a replica's ranks own equal shares of its tokens."""
    tokens_BD = np.broadcast_to(tokens_BD, (len(tokens_BD), topology.num_replicas))
    size = topology.tensor_parallel_size
    return np.repeat(tokens_BD / size, size, axis=1)
