"""What the dispatchers share: options, checks of arguments, the books, and combine in one call.

Legend: T my tokens, H hidden, K top-k, P pairs.
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from comms.codec import Records, WireFormat
from comms.dispatcher import (
    CombineMode,
    DispatchHandle,
    PendingCombine,
    PendingDispatch,
    Received,
    WireDtype,
)
from comms.group import Group, PendingExchange
from comms.groups import ParallelGroups
from comms.ledger import TrafficLedger
from comms.reduction import FixedReduction, NodeReduction, Reduction
from comms.routes import Indices, Pairs, pairs_by_row, weighted_sum
from comms.trace import NO_TRACE, Trace

_CHUNK_TOKENS = 256  # packed while the chunk before is being sent


class BaseDispatcher:
    """Options of a dispatcher. Raises ValueError for options that do not exist.

    slots_per_rank: the same on all ranks. dispatch_dtype: "bfloat16" sends rows in the model's own
    dtype, the others quantise them once. combine: see `reference.py`; combine_dtype: what carries
    the node sums of combine "node".
    """

    addressed = False  # whether packed rows say which token they are of

    def __init__(
        self,
        groups: ParallelGroups,
        *,
        slots_per_rank: int,
        hidden: int,
        dispatch_dtype: WireDtype = "bfloat16",
        combine: CombineMode = "node",
        combine_dtype: WireDtype = "bfloat16",
        trace: Trace = NO_TRACE,
    ) -> None:
        if slots_per_rank < 1 or hidden < 1:
            raise ValueError(f"need slots_per_rank, hidden >= 1, got {slots_per_rank}, {hidden}")
        _check_choice("dispatch_dtype", dispatch_dtype, get_args(WireDtype))
        _check_choice("combine", combine, get_args(CombineMode))
        _check_choice("combine_dtype", combine_dtype, get_args(WireDtype))
        self.groups = groups
        self.topology = groups.topology
        self.rank = groups.rank
        self.slots_per_rank = slots_per_rank
        self.hidden = hidden
        self.dispatch_dtype = dispatch_dtype
        self.combine_mode = combine
        self.combine_dtype = combine_dtype
        self.trace = trace
        self.ledger = TrafficLedger(topology=groups.topology, where=groups.where)
        self._wires: dict[tuple[torch.dtype, int], WireFormat] = {}

    def expect(self, max_tokens: int | None) -> int:
        return 1

    def start_dispatch(
        self, x_TH: Tensor, slots_TK: Tensor, weights_TK: Tensor, range_T: Tensor | None = None
    ) -> PendingDispatch:
        raise NotImplementedError

    def start_combine(self, outputs: Sequence[Tensor], handle: DispatchHandle) -> PendingCombine:
        raise NotImplementedError

    def dispatch_again(self, x_TH: Tensor, handle: DispatchHandle) -> Tensor:
        raise NotImplementedError

    def dispatch(
        self, x_TH: Tensor, slots_TK: Tensor, weights_TK: Tensor, range_T: Tensor | None = None
    ) -> tuple[Received, DispatchHandle]:
        pending = self.start_dispatch(x_TH, slots_TK, weights_TK, range_T)
        (received,) = pending
        return received, pending.handle

    def combine(self, y_PH: Tensor, handle: DispatchHandle) -> Tensor:
        outputs = torch.split(y_PH, list(handle.num_pairs)) if len(handle.num_pairs) > 1 else [y_PH]
        return self.start_combine(outputs, handle).wait()

    def _reduction(self, dtype: torch.dtype) -> Reduction:
        if self.combine_mode == "fixed":
            return FixedReduction(self.hidden, dtype)
        return NodeReduction(self.hidden, dtype, self.combine_dtype)

    def _local_slots(self, slots_RK: NDArray[Any]) -> Indices:
        """The local slot of each entry that is on this rank, -1 for the others."""
        local_RK = slots_RK.astype(np.int64) - self.rank * self.slots_per_rank
        local_RK[(local_RK < 0) | (local_RK >= self.slots_per_rank)] = -1
        return local_RK

    # -- arithmetic on what came home --------------------------------------------------------

    def _partials(self, messages: Sequence[Tensor], reduction: Reduction) -> list[Tensor]:
        """Partial sums as their ranks sent them, as bytes."""
        shape = (-1, reduction.partial_columns)
        return [message.view(reduction.partial_dtype).view(shape) for message in messages]

    def _sum_exact(
        self,
        messages: list[Tensor],
        destinations_TK: Indices,
        weights_TK: Tensor,
        dtype: torch.dtype,
    ) -> Tensor:
        """out_TH from the rows of all pairs, which came back by destination, then (token, k)."""
        pairs_PH = torch.cat(messages).view(dtype).view(-1, self.hidden)
        in_order_PH = pairs_PH[torch.from_numpy(pairs_by_row(destinations_TK))]
        return weighted_sum(in_order_PH, Pairs.of(destinations_TK, weights_TK.numpy())).to(dtype)

    # -- checks ------------------------------------------------------------------------------

    def _check(
        self, x_TH: Tensor, slots_TK: Tensor, weights_TK: Tensor, range_T: Tensor | None
    ) -> WireFormat:
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
        fixed = self.combine_mode == "fixed"
        if fixed and (range_T is None or range_T.shape != shape[:1]):
            got = "None" if range_T is None else _describe(range_T)
            raise ValueError(f'combine "fixed" needs range_T fp32 {[shape[0]]}, got {got}')
        wire = self._wires.get((x_TH.dtype, shape[1]))
        if wire is None:
            wire = self._wires[x_TH.dtype, shape[1]] = WireFormat(
                hidden=self.hidden,
                num_topk=shape[1],
                dtype=x_TH.dtype,
                codec=self.dispatch_dtype,
                num_slots=num_slots,
                with_range=fixed,
                with_address=self.addressed,
            )
        return wire

    def _check_outputs(
        self, outputs: Sequence[Tensor], handle: DispatchHandle, dtype: torch.dtype
    ) -> None:
        if len(outputs) != len(handle.num_pairs):
            raise ValueError(
                f"expected the outputs of {len(handle.num_pairs)} parts, got {len(outputs)}"
            )
        for y_PH, num_pairs in zip(outputs, handle.num_pairs, strict=True):
            if y_PH.dtype != dtype or tuple(y_PH.shape) != (num_pairs, self.hidden):
                raise ValueError(
                    f"y_PH must be {dtype} {[num_pairs, self.hidden]}, got {_describe(y_PH)}"
                )

    # -- moving bytes, booked ----------------------------------------------------------------

    def _packed(
        self,
        wire: WireFormat,
        x_TH: Tensor,
        slots_TK: Tensor,
        weights_TK: Tensor,
        range_T: Tensor | None,
        address: int | None = None,
    ) -> Iterator[Records]:
        """My tokens, chunk by chunk; at least one, which may be empty. `address`: of the first."""
        for lo in range(0, max(1, len(x_TH)), _CHUNK_TOKENS):
            chunk = slice(lo, lo + _CHUNK_TOKENS)
            ranges = range_T[chunk] if wire.with_range and range_T is not None else None
            first = None if address is None else address + lo
            yield wire.pack(x_TH[chunk], slots_TK[chunk], weights_TK[chunk], ranges, first)

    def _start(self, stage: str, group: Group, chunks: Iterable[Sequence[Tensor]]) -> "Booked":
        return Booked(self, stage, group, chunks)

    def _exchange(self, stage: str, group: Group, parts: Sequence[Tensor]) -> list[Tensor]:
        return self._start(stage, group, [parts]).wait()


class Booked:
    """A PendingExchange whose bytes, waits and time on the wire are booked."""

    def __init__(
        self,
        dispatcher: BaseDispatcher,
        stage: str,
        group: Group,
        chunks: Iterable[Sequence[Tensor]],
    ) -> None:
        self._dispatcher, self._stage, self._group = dispatcher, stage, group
        self._sent = [0] * group.size
        self._trace = dispatcher.trace
        self._started = time.perf_counter()
        self._pending: PendingExchange = group.start_exchange(self._counted(chunks), stage)
        ledger, rank = dispatcher.ledger, dispatcher.rank
        for peer, num_bytes in zip(group.ranks, self._sent, strict=True):
            ledger.record(stage, rank, peer, num_bytes)

    def wait(self) -> list[Tensor]:
        messages = self._pending.wait()
        group, dispatcher = self._group, self._dispatcher
        waits = self._pending.waits
        dispatcher.ledger.record_waits(self._stage, dispatcher.rank, group.ranks, waits)
        stream = "node" if group is dispatcher.groups.node else "network"
        self._trace.add(
            stream, self._stage, self._started, self._pending.finished, bytes=sum(self._sent)
        )
        return messages

    def _counted(self, chunks: Iterable[Sequence[Tensor]]) -> Iterable[Sequence[Tensor]]:
        """The chunks, counted as they go. A list stays one, so that the group sees which is the last
        and need not say so in a message of its own."""
        if not isinstance(chunks, Sequence):
            return map(self._count, chunks)
        return [self._count(parts) for parts in chunks]

    def _count(self, parts: Sequence[Tensor]) -> Sequence[Tensor]:
        for i, part in enumerate(parts):
            self._sent[i] += part.numel()
        return parts


def _check_choice(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")


def _describe(x: Tensor) -> str:
    return f"{x.dtype} {list(x.shape)}"
