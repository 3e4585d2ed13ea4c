"""What the dispatchers share: their options, the checks of their arguments, and the books.

Legend: T my tokens, H hidden, K top-k, P pairs.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from comms.codec import WireFormat
from comms.dispatcher import CombineMode, DispatchDtype, TrafficLedger
from comms.group import Group
from comms.groups import ParallelGroups


class BaseDispatcher:
    """Options of a dispatcher. Raises ValueError for options that do not exist.

    slots_per_rank: the same on all ranks. dispatch_dtype: "bfloat16" sends rows in the model's own
    dtype, "float8" quantises them once. combine: "node" or "exact", see `reference.py`.
    ledger: where to book what is sent; a new one by default.
    """

    def __init__(
        self,
        groups: ParallelGroups,
        *,
        slots_per_rank: int,
        hidden: int,
        dispatch_dtype: DispatchDtype = "bfloat16",
        combine: CombineMode = "node",
        ledger: TrafficLedger | None = None,
    ) -> None:
        if slots_per_rank < 1 or hidden < 1:
            raise ValueError(f"need slots_per_rank, hidden >= 1, got {slots_per_rank}, {hidden}")
        if dispatch_dtype not in ("bfloat16", "float8"):
            raise ValueError(f"dispatch_dtype must be bfloat16 or float8, got {dispatch_dtype!r}")
        if combine not in ("node", "exact"):
            raise ValueError(f"combine must be node or exact, got {combine!r}")
        self.groups = groups
        self.topology = groups.topology
        self.rank = groups.rank
        self.slots_per_rank = slots_per_rank
        self.hidden = hidden
        self.float8 = dispatch_dtype == "float8"
        self.combine_mode = combine
        self.ledger = ledger if ledger is not None else TrafficLedger(topology=groups.topology)

    def _check(self, x_TH: Tensor, slots_TK: Tensor, weights_TK: Tensor) -> WireFormat:
        """The wire format for these arguments, or ValueError."""
        num_slots = self.topology.world_size * self.slots_per_rank
        if x_TH.dim() != 2 or x_TH.shape[1] != self.hidden or not x_TH.is_floating_point():
            raise ValueError(f"x_TH must be floats [T, {self.hidden}], got {_describe(x_TH)}")
        shape = (x_TH.shape[0], slots_TK.shape[-1])
        if slots_TK.dtype != torch.int64 or tuple(slots_TK.shape) != shape:
            raise ValueError(f"slots_TK must be int64 {list(shape)}, got {_describe(slots_TK)}")
        if weights_TK.dtype != torch.float32 or weights_TK.shape != slots_TK.shape:
            raise ValueError(f"weights_TK must be fp32 {list(shape)}, got {_describe(weights_TK)}")
        if slots_TK.numel():
            low, high = slots_TK.aminmax()
            if int(low) < -1 or int(high) >= num_slots:
                raise ValueError(f"slots must be in [-1, {num_slots}), got {int(low)}..{int(high)}")
        return WireFormat(
            hidden=self.hidden, num_topk=shape[1], dtype=x_TH.dtype, float8=self.float8
        )

    def _check_outputs(self, y_PH: Tensor, num_pairs: int, dtype: torch.dtype) -> None:
        if y_PH.dtype != dtype or tuple(y_PH.shape) != (num_pairs, self.hidden):
            raise ValueError(
                f"y_PH must be {dtype} {[num_pairs, self.hidden]}, got {_describe(y_PH)}"
            )

    def _send(
        self, stage: str, group: Group, x: Tensor, send: Sequence[int], recv: Sequence[int]
    ) -> Tensor:
        """An all-to-all, booked in the ledger as `stage`."""
        row_bytes = x.element_size() * x[:1].numel() if len(x) else 0
        for rank, rows in zip(group.ranks, send, strict=True):
            self.ledger.record(stage, self.rank, rank, rows * row_bytes)
        return group.all_to_all(x, send, recv)

    def _exchange_counts(self, group: Group, counts: Tensor) -> Tensor:
        """counts[j] is for member j; returns what every member has for me."""
        ones = [1] * group.size
        return self._send("counts", group, counts, ones, ones)


def _describe(x: Tensor) -> str:
    return f"{x.dtype} {list(x.shape)}"
