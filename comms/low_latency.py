"""The dispatcher for decode: few tokens, shapes that never change.

Legend: T my tokens, C capacity, K top-k, H hidden, W ranks of the world, R received rows, B bytes of
a packed row.

Stages, messages and bits of the result are those of `hierarchical.py`. But no rank brings more than
C tokens, so the address of a row, source rank * C + token, is also its place at every expert:
what the experts get is always [W * C] rows, in one part. Rows that nobody sent have no slot and are
never read. A step for which more are expected (a prefill) goes as `hierarchical.py` does.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from comms.codec import WireFormat
from comms.dispatcher import Received
from comms.hierarchical import HierarchicalDispatcher, Part, TokensInFlight


class LowLatencyDispatcher(HierarchicalDispatcher):
    """TokenDispatcher of static shapes. `capacity`: most tokens that a rank brings in such a step."""

    def __init__(self, *args: Any, capacity: int = 64, **options: Any) -> None:
        super().__init__(*args, **options)
        if capacity < 1:
            raise ValueError(f"capacity must be >= 1 token, got {capacity}")
        self.capacity = capacity
        self._is_static = True

    def expect(self, max_tokens: int | None) -> int:
        self._is_static = max_tokens is None or max_tokens <= self.capacity
        # What is small is not worth splitting.
        return super().expect(None if self._is_static else max_tokens)

    @property
    def stride(self) -> int:
        return self.capacity if self._is_static else super().stride

    def start_dispatch(
        self, x_TH: Tensor, slots_TK: Tensor, weights_TK: Tensor, range_T: Tensor | None = None
    ) -> TokensInFlight:
        if self._is_static and len(x_TH) > self.capacity:
            raise ValueError(
                f"low_latency holds {self.capacity} tokens a rank, got {len(x_TH)}: raise its "
                "capacity, or tell all ranks to expect so many"
            )
        return super().start_dispatch(x_TH, slots_TK, weights_TK, range_T)

    def _hand_over(
        self, payloads: Sequence[NDArray[np.uint8]], part: Part, wire: WireFormat
    ) -> Received:
        received = super()._hand_over(payloads, part, wire)
        if not self._is_static:
            return received
        num_rows = self.topology.world_size * self.capacity
        # What is not set here belongs to no slot, and nobody reads it.
        x_RH = torch.empty((num_rows, self.hidden), dtype=wire.dtype)
        slots_RK = np.full((num_rows, wire.num_topk), -1)
        _bytes_of(x_RH)[part.address_R] = _bytes_of(received.x_RH)
        slots_RK[part.address_R] = part.local_slots_RK
        return Received(x_RH=x_RH, local_slots_RK=torch.from_numpy(slots_RK))


def _bytes_of(x_RH: Tensor) -> NDArray[np.uint8]:
    return x_RH.view(torch.uint8).numpy()
