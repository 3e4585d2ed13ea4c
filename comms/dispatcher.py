"""The contract of every dispatcher: tokens go to the ranks that host their experts, and come back.

Legend: T my tokens, H hidden, K top-k, R received rows, P (row, k) pairs with a slot on this rank.

A *slot* is a place for one physical expert; global slot id = rank * slots_per_rank + local slot.
Dispatchers know slots and ranks and nothing else: which logical expert sits in a slot is the
router's business. Slot order and sum order are pure functions of `slots_TK`, never of arrival.
"""

from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

from comms.ledger import TrafficLedger

__all__ = [
    "CombineMode",
    "DispatchDtype",
    "DispatchHandle",
    "Received",
    "TokenDispatcher",
    "TrafficLedger",
]

DispatchDtype = Literal["bfloat16", "float8"]  # bfloat16: rows travel in the model's own dtype
CombineMode = Literal["node", "exact"]


@dataclass(frozen=True, kw_only=True)
class Received:
    """What this rank's experts get, ordered by (source rank, source token), once per token.

    x_RH: model dtype, already dequantised.
    local_slots_RK: int64 local slot, -1 where the token's k-th slot is not on this rank.
    The valid (row, k) entries in row-major order are the P pairs that `combine` expects back.
    """

    x_RH: Tensor
    local_slots_RK: Tensor


@dataclass(frozen=True, kw_only=True)
class DispatchHandle:
    """What combine needs to retrace a dispatch; each dispatcher extends it."""

    num_pairs: int
    weights_TK: Tensor


class TokenDispatcher(Protocol):
    """Moves tokens to experts and expert outputs back. Collective over the world group."""

    def dispatch(
        self, x_TH: Tensor, slots_TK: Tensor, weights_TK: Tensor
    ) -> tuple[Received, DispatchHandle]:
        """Send each token once to every rank that hosts one of its slots.

        slots_TK: int64 global slot ids, -1 = none. weights_TK: fp32. T may be 0, K may not differ
        between ranks. Raises ValueError for shapes, dtypes or slot ids that cannot be.
        """

    def combine(self, y_PH: Tensor, handle: DispatchHandle) -> Tensor:
        """Weighted sum of the expert outputs of each token: out_TH, in the dtype of x.

        y_PH[p] is the *unweighted* output of pair p, in the model dtype.
        """
