"""One Mixture-of-Experts layer: gate, dispatch, experts, combine, plus the shared expert.

    x_TH --gate--> experts of each token --placement--> slots
         --dispatch--> rows for my slots --experts--> outputs --combine--> out_TH (+ shared expert)

`steps` stops whenever its tokens are in flight, so that another micro-batch can compute meanwhile.
Inside one, rows of the own node are computed while others are in flight (if the dispatcher brings
them in two parts), and the shared expert while outputs are on their way home.

T my tokens, H hidden, K experts per token, R received rows, P pairs for my slots, S my slots.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from comms.dispatcher import Received, TokenDispatcher
from experts.gains import token_ranges
from experts.grouped import run_experts
from experts.linear import stable_linear
from experts.mlp import GatedMLP
from experts.slot_choice import SlotChoice, StaticChoice
from experts.weights import ExpertSlots
from router.gate import Gate
from router.placement import LayerPlacement

Phase = Callable[[str], AbstractContextManager[None]]
"""phase("gate" | "dispatch" | "experts" | "combine"): entered around each part, to time it."""


def untimed(_name: str) -> AbstractContextManager[None]:
    return nullcontext()


def finish(steps: Generator[None, None, Tensor]) -> Tensor:
    """Run to the end what stops at points where others could run; its result."""
    try:
        while True:
            next(steps)
    except StopIteration as stop:
        result: Tensor = stop.value
        return result


class MoELayer:
    """The layer as seen by one rank. Collective: every rank calls forward, also with no tokens.

    `choice` says which copy a token goes to; None: the one that suits source `rank`. Set `gains_E`,
    the gains of all experts, for a dispatcher that combines "fixed". `layer_placement` may be
    replaced between steps. Raises ValueError if the slots are not as many as it gives a rank.

    Since the start, `routed_E` counts the gate's choices for this rank's own tokens, by logical
    expert, and `tokens_per_slot_S` the (token, expert) pairs computed here; `recent_TK` are the
    choices of the latest batch. Batches append theirs to `record` where a list is put there.
    """

    def __init__(
        self,
        *,
        gate: Gate,
        slots: ExpertSlots,
        dispatcher: TokenDispatcher,
        layer_placement: LayerPlacement,
        rank: int,
        choice: SlotChoice | None = None,
        shared_expert: Callable[[Tensor], Tensor] | None = None,
        phase: Phase = untimed,
    ) -> None:
        if slots.num_slots != layer_placement.slots_per_rank:
            raise ValueError(
                f"num_slots({slots.num_slots}) != slots_per_rank({layer_placement.slots_per_rank})"
            )
        self.gate, self.slots, self.dispatcher = gate, slots, dispatcher
        self.layer_placement, self.rank = layer_placement, rank
        self.choice = choice or StaticChoice(rank)
        self.shared_expert, self.phase = shared_expert, phase
        self.gains_E: Tensor | None = None
        self.tokens_per_slot_S = torch.zeros(slots.num_slots, dtype=torch.int64)
        self.routed_E = torch.zeros(layer_placement.num_experts, dtype=torch.int64)
        self.recent_TK = torch.empty(0, 1, dtype=torch.int64)
        self.record: list[Tensor] | None = None

    def forward(self, x_TH: Tensor) -> Tensor:
        """out_TH in x's dtype: weighted routed experts plus the shared expert. T may be 0."""
        return finish(self.steps(x_TH))

    def forget_counters(self) -> None:
        """Count from zero again."""
        self.routed_E.zero_()
        self.tokens_per_slot_S.zero_()
        self.recent_TK = self.recent_TK[:0]

    @property
    def num_bytes(self) -> int:
        """Of its weights besides the experts in slots: gate and shared expert."""
        bias_E, shared = self.gate.correction_bias_E, self.shared_expert
        own = self.gate.weight_EH.nbytes + (0 if bias_E is None else bias_E.nbytes)
        return own + (shared.num_bytes if isinstance(shared, GatedMLP) else 0)

    def steps(self, x_TH: Tensor) -> Generator[None, None, Tensor]:
        """forward, which yields twice: with the tokens, and with the outputs in flight."""
        with self.phase("gate"):
            ids_TK, weights_TK = self.gate(x_TH, stable_linear)
            counts_E = _count(ids_TK, len(self.routed_E))
            self.routed_E += counts_E
            self.recent_TK = ids_TK
            if self.record is not None:
                self.record.append(ids_TK)
            range_T = None
            if self.gains_E is not None:
                range_T = token_ranges(ids_TK, weights_TK, self.gains_E)
        with self.phase("dispatch"):
            slots_TK = self.choice.choose(ids_TK, counts_E, self.layer_placement)
            pending = self.dispatcher.start_dispatch(x_TH, slots_TK, weights_TK, range_T)
        yield
        outputs = list(self._outputs(iter(pending)))
        with self.phase("combine"):
            returning = self.dispatcher.start_combine(outputs, pending.handle)
        with self.phase("experts"):
            shared_TH = self.shared_expert(x_TH) if self.shared_expert else None
        yield
        with self.phase("combine"):
            out_TH = returning.wait()
        return out_TH if shared_TH is None else out_TH + shared_TH

    def _outputs(self, parts: Iterator[Received]) -> Iterator[Tensor]:
        """The experts' outputs of each part, as the parts arrive."""
        while True:
            with self.phase("dispatch"):
                part = next(parts, None)
            if part is None:
                return
            with self.phase("experts"):
                self.tokens_per_slot_S += _count(part.local_slots_RK, self.slots.num_slots)
                yield run_experts(part.x_RH, part.local_slots_RK, self.slots)


def _count(ids: Tensor, size: int) -> Tensor:
    """[size]: how often each id is there; -1 is not counted."""
    return torch.bincount(ids.flatten() + 1, minlength=size + 1)[1:]
