"""All collectives over one move: start a message to each member that gets one, wait for theirs.

A group that can do that move inherits the rest. Sums are made here from whole messages, in rank
order, so that their bits do not depend on what carried the bytes.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from comms.sizes import (
    as_bytes,
    check_counts,
    check_parts,
    check_sizes,
    empty_rows,
    even_sizes,
    row_bytes,
    sum_in_order,
)

_ONE_SHOT_BYTES = 64 * 1024  # beyond this an all-reduce is a reduce-scatter and an all-gather
_ONE_BYTE = torch.zeros(1, dtype=torch.uint8)

Parts = Sequence[Tensor | None]  # by member: flat uint8, or None where no message goes


class Transfer(Protocol):
    """A PendingExchange whose deadline can be replaced."""

    def wait(self, timeout_s: float | None = None) -> list[Tensor]: ...
    @property
    def waits(self) -> list[float]: ...
    @property
    def finished(self) -> float: ...


class ExchangeCollectives(ABC):
    """The operations of a Group, over `_start`."""

    def __init__(self, *, name: str, ranks: Sequence[int], rank: int) -> None:
        self.name = name
        self.ranks = tuple(ranks)
        self.size = len(self.ranks)
        self.idx = self.ranks.index(rank)
        self._others = tuple(i for i in range(self.size) if i != self.idx)

    @abstractmethod
    def _start(
        self,
        chunks: Iterable[Parts],
        stage: str,
        sources: Sequence[int],
        out: Tensor | None = None,
        sizes: Sequence[int] | None = None,
    ) -> Transfer:
        """Send each chunk as it comes; expect one message from each of `sources` (never me).

        Each message is all parts of one member together. Where `out` and `sizes` (bytes by member)
        are given, messages must have these sizes and land in `out`, in group order; otherwise any
        size is taken. My own part never travels: the result holds it, `out` does not.
        Parts stay unchanged until the wait returns; then all of them have left.
        """

    def exchange(self, parts: Sequence[Tensor], stage: str) -> list[Tensor]:
        check_parts(parts, self.size)
        return self._start([parts], stage, self._others).wait()

    def start_exchange(self, chunks: Iterable[Sequence[Tensor]], stage: str) -> Transfer:
        return self._start(chunks, stage, self._others)

    def all_gather(self, x: Tensor, sizes: Sequence[int]) -> Tensor:
        check_sizes(x, sizes, self.size, self.idx)
        out = empty_rows(x, sum(sizes))
        mine, unit = as_bytes(x), row_bytes(x)
        num_bytes = [n * unit for n in sizes]
        self._swap([mine] * self.size, "all_gather", as_bytes(out), num_bytes)
        return out

    def reduce_scatter(self, x: Tensor, sizes: Sequence[int]) -> Tensor:
        check_sizes(x, sizes, self.size)
        unit, mine = row_bytes(x), sizes[self.idx]
        parts = torch.empty((self.size, mine, *x.shape[1:]), dtype=x.dtype)
        sent = as_bytes(x).split([n * unit for n in sizes])
        self._swap(sent, "reduce_scatter", as_bytes(parts), [mine * unit] * self.size)
        return _sum(parts)

    def all_reduce(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1)
        if flat.shape[0] * flat.element_size() <= _ONE_SHOT_BYTES:
            parts = torch.empty((self.size, flat.shape[0]), dtype=x.dtype)
            mine = as_bytes(flat)
            num_bytes = [mine.shape[0]] * self.size
            self._swap([mine] * self.size, "all_reduce", as_bytes(parts), num_bytes)
            return _sum(parts).view(x.shape)
        sizes = even_sizes(flat.shape[0], self.size)
        return self.all_gather(self.reduce_scatter(flat, sizes), sizes).view(x.shape)

    def all_to_all(self, x: Tensor, send_sizes: Sequence[int], recv_sizes: Sequence[int]) -> Tensor:
        check_sizes(x, send_sizes, self.size)
        check_counts(recv_sizes, self.size)
        if send_sizes[self.idx] != recv_sizes[self.idx]:
            raise ValueError(
                f"expected {send_sizes[self.idx]} rows from myself, got {recv_sizes[self.idx]}"
            )
        out = empty_rows(x, sum(recv_sizes))
        unit = row_bytes(x)
        sent = as_bytes(x).split([n * unit for n in send_sizes])
        self._swap(sent, "all_to_all", as_bytes(out), [n * unit for n in recv_sizes])
        return out

    def broadcast(self, x: Tensor, source: int) -> Tensor:
        nothing: Parts = [None] * self.size
        if source == self.idx:
            data = as_bytes(x)
            self._start([self._to_others(data)], "broadcast", ()).wait()
            return x
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        data = as_bytes(out)
        num_bytes = [data.shape[0] if i == source else 0 for i in range(self.size)]
        self._start([nothing], "broadcast", (source,), data, num_bytes).wait()
        return out

    def broadcast_bytes(
        self, data: bytes | None, source: int, timeout_s: float | None = None
    ) -> bytes:
        if source != self.idx:
            nothing: Parts = [None] * self.size
            received = self._start([nothing], "broadcast_bytes", (source,)).wait(timeout_s)
            return bytes(received[source].numpy())
        if data is None:
            raise ValueError("the source of broadcast_bytes needs data, got None")
        payload = torch.frombuffer(bytearray(data or b"\0"), dtype=torch.uint8)[: len(data)]
        self._start([self._to_others(payload)], "broadcast_bytes", ()).wait(timeout_s)
        return data

    def barrier(self, timeout_s: float | None = None) -> None:
        out = torch.empty(self.size, dtype=torch.uint8)
        ones: Parts = [_ONE_BYTE] * self.size
        self._start([ones], "barrier", self._others, out, [1] * self.size).wait(timeout_s)

    def _swap(self, sent: Sequence[Tensor], stage: str, out: Tensor, sizes: Sequence[int]) -> None:
        """sent[j] to member j; what they send to `out`, my own part included."""
        transfer = self._start([sent], stage, self._others, out, sizes)
        out.split(list(sizes))[self.idx].copy_(sent[self.idx])  # while the others' are under way
        transfer.wait()

    def _to_others(self, data: Tensor) -> Parts:
        return [None if i == self.idx else data for i in range(self.size)]


def _sum(parts: Tensor) -> Tensor:
    total = torch.empty_like(parts[0])
    sum_in_order(total.view(-1), [part.view(-1) for part in parts])
    return total
