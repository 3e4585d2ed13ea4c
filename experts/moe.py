"""One Mixture-of-Experts layer: gate, dispatch, experts, combine, plus the shared expert.

    x_TH --gate--> experts of each token --placement--> slots
         --dispatch--> rows for my slots --experts--> outputs --combine--> out_TH (+ shared expert)

T my tokens, H hidden, K experts per token, R received rows, P pairs for my slots, S my slots.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from comms.dispatcher import TokenDispatcher
from experts.grouped import run_experts
from experts.linear import stable_linear
from experts.weights import ExpertSlots
from router.gate import Gate
from router.placement import LayerPlacement

Phase = Callable[[str], AbstractContextManager[None]]
"""phase("gate" | "dispatch" | "experts" | "combine"): entered around each part, to time it."""


def untimed(_name: str) -> AbstractContextManager[None]:
    return nullcontext()


class MoELayer:
    """The layer as seen by one rank. Collective: every rank calls forward, also with no tokens.

    `rank` is this rank in the world. `tokens_per_slot_S` counts (token, expert) pairs computed
    since the start. Raises ValueError if the slots are not as many as the placement gives a rank.
    """

    def __init__(
        self,
        *,
        gate: Gate,
        slots: ExpertSlots,
        dispatcher: TokenDispatcher,
        layer_placement: LayerPlacement,
        rank: int,
        shared_expert: Callable[[Tensor], Tensor] | None = None,
        phase: Phase = untimed,
    ) -> None:
        if slots.num_slots != layer_placement.slots_per_rank:
            raise ValueError(
                f"num_slots({slots.num_slots}) != slots_per_rank({layer_placement.slots_per_rank})"
            )
        self.gate, self.slots, self.dispatcher = gate, slots, dispatcher
        self.layer_placement, self.rank = layer_placement, rank
        self.shared_expert, self.phase = shared_expert, phase
        self.tokens_per_slot_S = torch.zeros(slots.num_slots, dtype=torch.int64)

    def forward(self, x_TH: Tensor) -> Tensor:
        """out_TH in x's dtype: weighted routed experts plus the shared expert. T may be 0."""
        with self.phase("gate"):
            ids_TK, weights_TK = self.gate(x_TH, stable_linear)
            slots_TK = self.layer_placement.choose_slots(ids_TK, self.rank)
        with self.phase("dispatch"):
            received, handle = self.dispatcher.dispatch(x_TH, slots_TK, weights_TK)
        with self.phase("experts"):
            y_PH = run_experts(received.x_RH, received.local_slots_RK, self.slots)
            self._count(received.local_slots_RK)
            shared_TH = self.shared_expert(x_TH) if self.shared_expert else None
        with self.phase("combine"):
            out_TH = self.dispatcher.combine(y_PH, handle)
        return out_TH if shared_TH is None else out_TH + shared_TH

    def _count(self, local_slots_RK: Tensor) -> None:
        empty_first = torch.bincount(
            local_slots_RK.flatten() + 1, minlength=len(self.tokens_per_slot_S) + 1
        )
        self.tokens_per_slot_S += empty_first[1:]
