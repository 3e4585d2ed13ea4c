"""The dispatcher for decode: few tokens, shapes that never change.

Legend: T my tokens, C capacity, K top-k, H hidden, W ranks of the world, R received rows, B bytes of
a packed row.

Stages, messages and bits of the result are those of `hierarchical.py`. But no rank brings more than
C tokens, so the address of a row, source rank * C + token, is also its place at every expert:
what the experts get is always [W * C] rows, in one part. Rows that nobody sent have no slot and are
never read.
"""

from typing import Any

import torch
from torch import Tensor

from comms.dispatcher import Received
from comms.hierarchical import HierarchicalDispatcher, Part, TokensInFlight


class LowLatencyDispatcher(HierarchicalDispatcher):
    """TokenDispatcher of static shapes. `capacity`: most tokens that a rank may bring."""

    def __init__(self, *args: Any, capacity: int = 64, **options: Any) -> None:
        super().__init__(*args, **options)
        if capacity < 1:
            raise ValueError(f"capacity must be >= 1 token, got {capacity}")
        self.capacity = capacity

    def expect(self, max_tokens: int | None) -> int:
        return 1  # what is small is not worth splitting

    @property
    def stride(self) -> int:
        return self.capacity

    def start_dispatch(
        self, x_TH: Tensor, slots_TK: Tensor, weights_TK: Tensor, range_T: Tensor | None = None
    ) -> TokensInFlight:
        if len(x_TH) > self.capacity:
            raise ValueError(
                f"low_latency holds {self.capacity} tokens a rank, got {len(x_TH)}: raise its "
                "capacity or use hierarchical"
            )
        return super().start_dispatch(x_TH, slots_TK, weights_TK, range_T)

    def _hand_over(self, x_RH: Tensor, part: Part) -> Received:
        num_rows = self.topology.world_size * self.capacity
        # What is not set here belongs to no slot, and nobody reads it.
        placed_RH = torch.empty((num_rows, self.hidden), dtype=x_RH.dtype)
        slots_RK = torch.full((num_rows, part.local_slots_RK.shape[1]), -1)
        placed_RH[part.address_R] = x_RH
        slots_RK[part.address_R] = part.local_slots_RK
        return Received(x_RH=placed_RH, local_slots_RK=slots_RK)
