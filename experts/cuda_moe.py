"""One Mixture-of-Experts layer on a GPU: `experts/moe.py` in kernels that never wait for the host.

    x_TH --gate--> experts of each token --table--> slots --sort--> grouped products --weighted sum-->
         (+ shared expert, on a second stream beside them)

Shapes depend on the number of rows alone, never on the choices, so a CUDA graph can hold the layer. All
that a step changes later lives at a fixed place: the table of slots is overwritten by a new placement,
counters grow, and rows beyond the number of tokens (a number on the device) have no experts.

T rows, H hidden, K experts per token, E experts, S my slots, I intermediate, M remembered tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from experts.float8 import multiplies_float8
from experts.kernels.choose import Choice, Tally, choose_slots
from experts.kernels.combine import Unsummed
from experts.kernels.grouped import expert_ffn
from experts.kernels.linear import linear, linear_fp32_parts
from experts.kernels.quantize import quantize
from experts.kernels.sort_by_slot import sort_by_slot
from experts.kernels.swiglu import swiglu, swiglu_quantized
from experts.kernels.types import DeviceExperts, NormedRows, QuantizedRows, SortedPairs
from experts.second_stream import Aside
from experts.slot_choice import SlotChoice, StaticChoice
from router.gate import Gate
from router.placement import LayerPlacement

Rows = Tensor | QuantizedRows

_REMEMBERED = 32  # tokens of the latest step, for statistics
_OVERLAPPED = 1024  # rows of which the shared expert runs beside the rest: neither fills a GPU


class DevicePool(Protocol):
    """Whoever owns the buffers of the experts."""

    @property
    def experts(self) -> DeviceExperts: ...


class Exchange(Protocol):
    """Tokens to the ranks of their slots and outputs back, on the device (world size > 1)."""

    def routed(
        self,
        x_TH: Tensor,
        choice: Choice,
        compute: Callable[[Rows, Tensor], tuple[Tensor, SortedPairs]],
    ) -> Tensor:
        """out_TH bf16. `compute` takes received rows and their local slots (int32 [R, K], -1 = none)
        and returns the outputs of the pairs, y_PH in sorted order, with that order."""


@dataclass(frozen=True, kw_only=True)
class SharedExpert:
    """The MLP that every token passes: w13 [2I, H], w2 [H, I], bf16, or e4m3 with block scales."""

    w13: Tensor
    w2: Tensor
    w13_scale: Tensor | None = None
    w2_scale: Tensor | None = None

    def __call__(self, x: Rows) -> Tensor:
        """[T, H] bf16; FP8 weights take quantised rows too."""
        gate_up = linear(x, self.w13, self.w13_scale)
        h = swiglu(gate_up) if self.w2_scale is None else swiglu_quantized(gate_up)
        return linear(h, self.w2, self.w2_scale)

    @property
    def is_float8(self) -> bool:
        return self.w13_scale is not None

    @property
    def num_bytes(self) -> int:
        tensors = (self.w13, self.w2, self.w13_scale, self.w2_scale)
        return sum(x.nbytes for x in tensors if x is not None)


class CudaMoELayer:
    """The layer as seen by one rank; what outlives a step is named as in `MoELayer`.

    gate: with its weights on the device. `gains_E` (fp32, device) makes the sum associative. Without
    an `exchange` all slots of the placement are this rank's. `layer_placement` may be replaced
    between steps, also those of a captured graph. Raises ValueError if the slots are not as many as
    the placement gives a rank.
    """

    def __init__(
        self,
        *,
        gate: Gate,
        slots: DevicePool,
        layer_placement: LayerPlacement,
        rank: int = 0,
        shared_expert: SharedExpert | None = None,
        gains_E: Tensor | None = None,
        exchange: Exchange | None = None,
    ) -> None:
        num_slots = slots.experts.num_slots
        if num_slots != layer_placement.slots_per_rank:
            raise ValueError(
                f"num_slots({num_slots}) != slots_per_rank({layer_placement.slots_per_rank})"
            )
        if exchange is None and layer_placement.num_ranks > 1:
            raise ValueError(f"num_ranks({layer_placement.num_ranks}) need an exchange")
        device, num_experts = gate.weight_EH.device, layer_placement.num_experts
        self.gate, self.slots, self.rank = gate, slots, rank
        self.shared_expert, self.gains_E, self.exchange = shared_expert, gains_E, exchange
        self.choice: SlotChoice = StaticChoice(rank)
        self.record: list[Tensor] | None = None
        self._table_E = torch.empty(num_experts, dtype=torch.int32, device=device)
        self._tally = Tally(
            chosen_E=torch.zeros(num_experts, dtype=torch.int64, device=device),
            recent_MK=torch.full(
                (_REMEMBERED, gate.config.num_experts_per_token), -1, device=device
            ),
        )
        self._computed_S = torch.zeros(num_slots, dtype=torch.int64, device=device)
        self.layer_placement = layer_placement

    @property
    def layer_placement(self) -> LayerPlacement:
        return self._layer_placement

    @layer_placement.setter
    def layer_placement(self, layer: LayerPlacement) -> None:
        self._layer_placement = layer
        ids_1E = torch.arange(layer.num_experts)[None]
        self._table_E.copy_(layer.choose_slots(ids_1E, self.rank)[0])

    def forward(self, x: Tensor | NormedRows, num_tokens: Tensor | None = None) -> Tensor:
        """out_TH bf16: weighted routed experts plus the shared expert, for bf16 rows.

        num_tokens: int32 [1] on the device, how many of the rows are tokens (None: all).
        """
        out = self.unsummed(x, num_tokens)
        return out if isinstance(out, Tensor) else out.sum()

    def unsummed(
        self, x: Tensor | NormedRows, num_tokens: Tensor | None = None
    ) -> Tensor | Unsummed:
        """`forward` but for the weighted sum, where that is the last that there is to do."""
        rows = NormedRows(x) if isinstance(x, Tensor) else x
        x_TH = rows.x_RH
        quantizes = self.reads_float8 and rows.quantized is None
        has_more = quantizes or self.shared_expert is not None
        aside = Aside(x_TH.device, on=has_more and 0 < len(x_TH) <= _OVERLAPPED)
        with aside:
            if quantizes:
                rows = NormedRows(x_TH, quantize(x_TH))
            ready = aside.mark()
            shared_TH = self._shared(rows)
        choice = self.choose(x_TH, num_tokens)
        # Of all tokens' pairs, about as many are for this rank's experts as its own tokens have.
        compute = partial(self.compute, expected_pairs=choice.ids_TK.numel())
        if self.exchange:
            out_TH = self.exchange.routed(x_TH, choice, compute)
            aside.join()
            return out_TH if shared_TH is None else out_TH + shared_TH
        if quantizes:
            aside.join(ready)
        assert choice.slots_TK is not None
        of_experts = rows.for_matrix(float8=self.slots.experts.is_float8)
        y_PH, pairs = compute(of_experts, choice.slots_TK)
        aside.join()
        return Unsummed(
            y_PH=y_PH, pairs=pairs, weights_RK=choice.weights_TK,
            range_R=choice.range_T, extra_RH=shared_TH,
        )  # fmt: skip

    def forget_counters(self) -> None:
        """Count from zero again."""
        self._tally.chosen_E.zero_()
        self._tally.recent_MK.fill_(-1)
        self._computed_S.zero_()

    @property
    def routed_E(self) -> Tensor:
        """On the host, like all counters: waits for the device."""
        return self._tally.chosen_E.cpu()

    @property
    def tokens_per_slot_S(self) -> Tensor:
        return self._computed_S.cpu()

    @property
    def recent_TK(self) -> Tensor:
        """The choices of the first tokens of the latest step."""
        recent_MK = self._tally.recent_MK.cpu()
        return recent_MK[recent_MK[:, 0] >= 0]

    @property
    def num_bytes(self) -> int:
        """Weights of gate and shared expert."""
        bias_E = self.gate.correction_bias_E
        own = self.gate.weight_EH.nbytes + (0 if bias_E is None else bias_E.nbytes)
        return own + (self.shared_expert.num_bytes if self.shared_expert else 0)

    @property
    def reads_float8(self) -> bool:
        """Whether a matrix here takes rows in FP8; on a GPU that cannot multiply it, none."""
        shared = self.shared_expert
        routed = self.slots.experts.is_float8 and self.exchange is None
        has_float8 = routed or (shared is not None and shared.is_float8)
        return has_float8 and multiplies_float8(self.gate.weight_EH.device)

    def _shared(self, rows: NormedRows) -> Tensor | None:
        shared = self.shared_expert
        if shared is None or not len(rows.x_RH):
            return None
        return shared(rows.for_matrix(float8=shared.is_float8))

    def choose(self, x_TH: Tensor, num_tokens: Tensor | None = None) -> Choice:
        """The gate's choice for these rows, counted."""
        gate, num_experts = self.gate, len(self.gate.weight_EH)
        if len(x_TH):
            logits = linear_fp32_parts(x_TH, gate.weight_EH)
        else:  # a rank without tokens takes part in the others' step
            logits = x_TH.new_empty((0, num_experts), dtype=torch.float32)
        choice = choose_slots(
            logits, gate.config, gate.correction_bias_E,
            num_tokens=num_tokens, table_E=self._table_E, gains_E=self.gains_E, tally=self._tally,
        )  # fmt: skip
        if self.record is not None:
            self.record.append(choice.ids_TK)
        return choice

    def compute(
        self, rows: Rows, local_slots_RK: Tensor, expected_pairs: int = 0
    ) -> tuple[Tensor, SortedPairs]:
        """The outputs of the pairs with a slot here, in sorted order, counted; int32 or int64 slots.

        expected_pairs: at least so many should be there. No bit depends on it.
        """
        experts = self.slots.experts
        expected_pairs = max(
            expected_pairs, local_slots_RK.numel() // self.layer_placement.num_ranks
        )
        pairs = sort_by_slot(local_slots_RK, experts.num_slots, counter_S=self._computed_S)
        if not local_slots_RK.numel():
            device = local_slots_RK.device
            return torch.empty(0, experts.hidden, dtype=torch.bfloat16, device=device), pairs
        return expert_ffn(rows, pairs, experts, expected_pairs=expected_pairs), pairs
