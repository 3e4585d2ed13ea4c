"""The contract of every dispatcher: tokens go to the ranks that host their experts, and come back.

Legend: T my tokens, H hidden, K top-k, R received rows, P (row, k) pairs with a slot on this rank.

A *slot* is a place for one physical expert; global slot id = rank * slots_per_rank + local slot.
Dispatchers know slots and ranks and nothing else: which logical expert sits in a slot is the
router's business. Slot order and sum order are pure functions of `slots_TK`, never of arrival.
"""

from dataclasses import dataclass, field
from typing import Literal, Protocol

from torch import Tensor

from comms.topology import Topology

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


@dataclass(kw_only=True)
class TrafficLedger:
    """Bytes and messages as sent, per (stage, source rank, destination rank).

    Rows that stay on their rank are not sent and not counted. Each rank records what it sends;
    `merge` adds up the ledgers of several ranks.
    """

    topology: Topology
    num_bytes: dict[tuple[str, int, int], int] = field(default_factory=dict)
    num_messages: dict[tuple[str, int, int], int] = field(default_factory=dict)

    def record(self, stage: str, source: int, destination: int, num_bytes: int) -> None:
        if num_bytes == 0 or source == destination:
            return
        key = (stage, source, destination)
        self.num_bytes[key] = self.num_bytes.get(key, 0) + num_bytes
        self.num_messages[key] = self.num_messages.get(key, 0) + 1

    def merge(self, other: "TrafficLedger") -> None:
        for key, value in other.num_bytes.items():
            self.num_bytes[key] = self.num_bytes.get(key, 0) + value
        for key, value in other.num_messages.items():
            self.num_messages[key] = self.num_messages.get(key, 0) + value

    def clear(self) -> None:
        self.num_bytes.clear()
        self.num_messages.clear()

    def intra_node_bytes(self, stage: str | None = None) -> int:
        """Bytes between different ranks of one node, of one stage or of all."""
        return self._total(stage, same_node=True)

    def inter_node_bytes(self, stage: str | None = None) -> int:
        """Bytes between nodes, of one stage or of all."""
        return self._total(stage, same_node=False)

    def _total(self, stage: str | None, *, same_node: bool) -> int:
        node_of = self.topology.node_of
        return sum(
            value
            for (key_stage, source, destination), value in self.num_bytes.items()
            if (stage is None or stage == key_stage)
            and (node_of(source) == node_of(destination)) == same_node
        )
