"""Expert layers over the GPUs of a node: tokens to the ranks of their experts, sums back.

All layers share one dispatcher. Every rank makes the same passes with the same number of rows, padding
among them, because kernels of one rank wait for those of the others.

Legend: T rows, H hidden, K experts per token, P pairs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from comms.store import Store
from comms.symmetric import SymmetricDispatcher
from comms.symmetric_layout import SymmetricLayout
from comms.where import Where
from experts.cuda_moe import Rows
from experts.kernels.choose import Choice
from experts.kernels.types import QuantizedRows, SortedPairs


class SymmetricExchange:
    """`Exchange` of `experts.cuda_moe` by stores into the other GPUs' memory."""

    def __init__(self, dispatcher: SymmetricDispatcher) -> None:
        self.dispatcher = dispatcher

    @classmethod
    def connect(
        cls, layout: SymmetricLayout, store: Store, rank: int, device: torch.device, where: Where
    ) -> SymmetricExchange:
        """Collective over the ranks of the node."""
        return cls(SymmetricDispatcher.connect(layout, store, rank, device, where=where))

    def expect(self, num_rows: int) -> None:
        """Of every rank in the coming pass."""
        self.dispatcher.expect(num_rows)

    def check(self) -> None:
        """Raise CommTimeout or CommError if a peer failed in a pass that is over. A replayed graph does not
        look by itself."""
        self.dispatcher.check()

    def routed(
        self,
        x_TH: Tensor,
        choice: Choice,
        compute: Callable[[Rows, Tensor], tuple[Tensor, SortedPairs]],
    ) -> Tensor:
        """out_TH: the weighted sums of what the experts of all ranks make of the rows."""
        assert choice.slots_TK is not None
        received, handle = self.dispatcher.dispatch(
            x_TH, choice.slots_TK, choice.weights_TK, choice.range_T
        )
        rows: Rows = received.x_RH
        if received.scale_RB is not None:
            rows = QuantizedRows(q_RH=received.x_RH, scale_RB=received.scale_RB)
        y_PH, pairs = compute(rows, received.local_slots_RK)
        return self.dispatcher.combine(y_PH, pairs.place_RK, handle)
