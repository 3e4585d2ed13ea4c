"""The contract of every dispatcher: tokens go to the ranks that host their experts, and come back.

Legend: T my tokens, H hidden, K top-k, R received rows, P (row, k) pairs with a slot on this rank.

A *slot* is a place for one physical expert; global slot id = rank * slots_per_rank + local slot.
Dispatchers know slots and ranks and nothing else: which logical expert sits in a slot is the
router's business. Slot order and sum order are pure functions of `slots_TK`, never of arrival.

Each way has two halves, so that work can go on while bytes are in flight:

    pending = dispatcher.start_dispatch(x_TH, slots_TK, weights_TK)
    outputs = [experts(part) for part in pending]     # rows of my own node may come first
    home    = dispatcher.start_combine(outputs, pending.handle)
    ...                                               # the shared expert, say
    out_TH  = home.wait()
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

from comms.ledger import TrafficLedger
from comms.trace import Trace

WireDtype = Literal["bfloat16", "float8", "float8_ue8m0", "logfmt10", "int6", "int8", "int10"]
CombineMode = Literal["node", "exact", "fixed"]


@dataclass(frozen=True, kw_only=True)
class Received:
    """What this rank's experts get, ordered by (source rank, source token), once per token.

    x_RH: model dtype, already decoded.
    local_slots_RK: int64 local slot, -1 where the token's k-th slot is not on this rank.
    The valid (row, k) entries in row-major order are the P pairs that `combine` expects back.
    """

    x_RH: Tensor
    local_slots_RK: Tensor


@dataclass(frozen=True, kw_only=True)
class DispatchHandle:
    """What combine needs to retrace a dispatch; each dispatcher extends it.

    num_pairs: how many pairs each received part has.
    """

    num_pairs: tuple[int, ...]
    weights_TK: Tensor
    range_T: Tensor | None


class PendingDispatch(Protocol):
    """Tokens on their way. Iterate it once; each part comes as soon as it is here."""

    def __iter__(self) -> Iterator[Received]:
        """One part, or two: rows from my own node, then rows from the others."""

    @property
    def handle(self) -> DispatchHandle:
        """For combine; complete once all parts have been taken."""


class PendingCombine(Protocol):
    """Expert outputs on their way home."""

    def wait(self) -> Tensor:
        """out_TH: each token's weighted sum, in the dtype of x. Call it once."""


class TokenDispatcher(Protocol):
    """Moves tokens to experts and expert outputs back. Collective over the world group.

    Dispatches may overlap, as long as every rank starts and finishes them in the same order.
    `ledger` books what this rank sends, `trace` shows when.
    """

    ledger: TrafficLedger
    trace: Trace

    def expect(self, max_tokens: int | None) -> int:
        """No rank has more tokens in the coming step (None: unknown); the same on every rank.

        By it all ranks choose alike what to overlap. Returns in how many micro-batches the step's
        tokens should be dispatched.
        """

    def start_dispatch(
        self, x_TH: Tensor, slots_TK: Tensor, weights_TK: Tensor, range_T: Tensor | None = None
    ) -> PendingDispatch:
        """Send each token once to every rank that hosts one of its slots.

        slots_TK: int64 global slot ids, -1 = none. weights_TK: fp32. range_T: fp32, for combine
        "fixed" only, see `fixed.py`. T may be 0, K may not differ between ranks. Raises ValueError
        for shapes, dtypes or slot ids that cannot be.
        """

    def start_combine(self, outputs: Sequence[Tensor], handle: DispatchHandle) -> PendingCombine:
        """outputs[i][p] is the *unweighted* output of pair p of part i, in the model dtype.

        They may be in flight until `wait` returns: leave them alone until then.
        """

    def dispatch(
        self, x_TH: Tensor, slots_TK: Tensor, weights_TK: Tensor, range_T: Tensor | None = None
    ) -> tuple[Received, DispatchHandle]:
        """start_dispatch, and everything in one part."""

    def dispatch_again(self, x_TH: Tensor, handle: DispatchHandle) -> Tensor:
        """Another payload the same way: x_RH in the row order of the handle's dispatch."""

    def combine(self, y_PH: Tensor, handle: DispatchHandle) -> Tensor:
        """start_combine of the outputs of all parts, and the sum: out_TH."""
