"""One step of one card of 64: the rows that come to it, and what comes back for its own tokens.

Legend: T tokens, R received rows, P pairs, H hidden, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from router.gate import GateConfig

if TYPE_CHECKING:
    from experts.kernels.choose import Choice
    from experts.kernels.types import QuantizedRows, SortedPairs

GATE = GateConfig(
    num_experts=256, num_experts_per_token=8, scoring="sigmoid", num_groups=8, num_groups_per_token=4,
    group_score="top2_sum", renormalize=True, scaling_factor=2.5,
)  # fmt: skip
CARDS = 64
EXPERTS = GATE.num_experts // CARDS
"""On each card."""


@dataclass(frozen=True, kw_only=True)
class Arrived:
    """Rows of a step on this card, and the other cards' answers to its own tokens."""

    slots_RK: Tensor
    weights_RK: Tensor
    rows: QuantizedRows | Tensor
    home_YH: Tensor
    home: SortedPairs
    ones_TK: Tensor

    def counts(self) -> list[int]:
        """Pairs of each expert here."""
        return [int((self.slots_RK == slot).sum()) for slot in range(EXPERTS)]

    def routed(
        self,
        x_TH: Tensor,
        choice: Choice,
        compute: Callable[[Any, Tensor], tuple[Tensor, SortedPairs]],
    ) -> Tensor:
        """An `Exchange` without a wire: both directions have already happened."""
        self.partial(*compute(self.rows, self.slots_RK))
        return self.sum_home()

    def partial(self, y_PH: Tensor, pairs: SortedPairs) -> Tensor:
        from experts.kernels.combine import weighted_sum

        return weighted_sum(y_PH, pairs, self.weights_RK)

    def sum_home(self) -> Tensor:
        from experts.kernels.combine import weighted_sum

        return weighted_sum(self.home_YH, self.home, self.ones_TK)


def arrived(tokens: int, hidden: int, dtype: str, seed: int, *, with_gaps: bool = False) -> Arrived:
    """Of `tokens` tokens on each of 64 cards, with experts drawn evenly, those that this card gets.

    `with_gaps`: as in a receive buffer of static shape, where every token has its place.
    """
    from experts.kernels.types import SortedPairs

    num_topk, local = GATE.num_experts_per_token, EXPERTS
    rng = np.random.default_rng(seed)
    drawn = rng.random((CARDS * tokens, GATE.num_experts)).argsort(axis=1)[:, :num_topk]
    slots = np.where(drawn < local, drawn, -1)
    came = slice(None) if with_gaps else (slots >= 0).any(axis=1)
    slots_RK = torch.from_numpy(slots[came]).to("cuda", torch.int32)
    x_RH = torch.randn(len(slots_RK), hidden, device="cuda", dtype=torch.bfloat16)
    number = tokens * num_topk
    place_TK = torch.arange(number, device="cuda", dtype=torch.int32).view(tokens, num_topk)
    ends_S = torch.tensor([number], device="cuda", dtype=torch.int32)
    return Arrived(
        slots_RK=slots_RK,
        weights_RK=torch.rand(slots_RK.shape, device="cuda"),
        rows=rows_of(x_RH, dtype),
        home_YH=torch.randn(number, hidden, device="cuda", dtype=torch.bfloat16),
        home=SortedPairs(pair_P=place_TK.flatten(), place_RK=place_TK, ends_S=ends_S),
        ones_TK=torch.ones(tokens, num_topk, device="cuda"),
    )


def rows_of(x_RH: Tensor, dtype: str) -> QuantizedRows | Tensor:
    """As experts of that dtype take them."""
    from experts.kernels.quantize import quantize

    return quantize(x_RH) if dtype == "float8" else x_RH
