"""The dispatcher of a world of one rank: nothing is sent, and the arithmetic is that of the others.

Rows are quantised and sums rounded as if they travelled, so that a token's result does not depend on how
many ranks there are.

Legend: T my tokens, H hidden, K top-k, R rows with an expert, P pairs.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from comms.base import BaseDispatcher
from comms.codec import WireFormat
from comms.dispatcher import DispatchHandle, Received
from comms.reduction import Reduction
from comms.routes import Indices, Pairs, weighted_sum


@dataclass(frozen=True, kw_only=True)
class LocalHandle(DispatchHandle):
    """`rows_R`: the tokens that have an expert; None if all have. `pairs` add to tokens."""

    wire: WireFormat
    reduction: Reduction
    rows_R: Indices | None
    pairs: Pairs


class LocalDispatcher(BaseDispatcher):
    """TokenDispatcher where every slot is here."""

    def start_dispatch(
        self, x_TH: Tensor, slots_TK: Tensor, weights_TK: Tensor, range_T: Tensor | None = None
    ) -> "TokensAtHand":
        wire = self._check(x_TH, slots_TK, weights_TK, range_T)
        slots = slots_TK.numpy()
        has_slot_T = (slots >= 0).any(axis=1)
        pairs = Pairs.of(slots, weights_TK.numpy())
        handle = LocalHandle(
            num_pairs=(len(pairs),),
            weights_TK=weights_TK,
            range_T=range_T,
            wire=wire,
            reduction=self._reduction(x_TH.dtype),
            rows_R=None if has_slot_T.all() else np.flatnonzero(has_slot_T),
            pairs=pairs,
        )
        taken = slots_TK if handle.rows_R is None else slots_TK[torch.from_numpy(handle.rows_R)]
        return TokensAtHand(Received(x_RH=_taken(x_TH, handle), local_slots_RK=taken), handle)

    def dispatch_again(self, x_TH: Tensor, handle: DispatchHandle) -> Tensor:
        return _taken(x_TH, self._own(handle))

    def start_combine(self, outputs: Sequence[Tensor], handle: DispatchHandle) -> "SumsAtHand":
        handle = self._own(handle)
        self._check_outputs(outputs, handle, handle.wire.dtype)
        (y_PH,) = outputs
        if self.combine_mode == "exact":
            return SumsAtHand(weighted_sum(y_PH, handle.pairs).to(handle.wire.dtype))
        sum_TH = handle.reduction.partial(y_PH, handle.pairs, handle.range_T)
        return SumsAtHand(handle.reduction.total_of_one(sum_TH, handle.range_T))

    def _own(self, handle: DispatchHandle) -> LocalHandle:
        if not isinstance(handle, LocalHandle):
            raise ValueError(f"not a handle of this dispatcher: {type(handle).__name__}")
        return handle


@dataclass(frozen=True)
class TokensAtHand:
    """PendingDispatch of one part."""

    received: Received
    handle: LocalHandle

    def __iter__(self) -> Iterator[Received]:
        yield self.received


@dataclass(frozen=True)
class SumsAtHand:
    """PendingCombine that waits for nothing."""

    out_TH: Tensor

    def wait(self) -> Tensor:
        return self.out_TH


def _taken(x_TH: Tensor, handle: LocalHandle) -> Tensor:
    """Rows as the experts get them."""
    rows = x_TH if handle.rows_R is None else x_TH[torch.from_numpy(handle.rows_R)]
    return handle.wire.decode(handle.wire.encode(rows).numpy())
