"""Collectives between hosts by gloo: the transport to compare with, and to fall back on.

gloo only moves bytes here (one uneven all-to-all or one broadcast); every sum is ours, in rank order
in fp32, so results have the same bits as over any other transport. An exchange takes two operations,
lengths and then bytes, and nothing moves before its wait. The process group is built explicitly over
a prefix of the store: no default group, nothing lazy. When a call fails, the members leave a note in
the store, so that the error can name the peers that never arrived.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch.distributed import (
    AllToAllOptions,
    BroadcastOptions,
    ProcessGroupGloo,
)

from comms.collectives import ExchangeCollectives, Parts
from comms.diagnosis import Diagnosis
from comms.group import CommError
from comms.sizes import as_bytes, check_parts, joined
from comms.store import PrefixStore, Store

_NOTE_S = 0.4  # how long the late may be behind the first to time out
_SLICE_S = 0.2
_TIMEOUT_WORDS = ("timed out", "timeout", "timedout")


class GlooGroup(ExchangeCollectives):
    """A Group over gloo; collective constructor. `host` is the local address to bind."""

    def __init__(
        self,
        *,
        name: str,
        ranks: Sequence[int],
        rank: int,
        store: Store,
        diagnosis: Diagnosis,
        timeout_s: float = 60.0,
        host: str = "127.0.0.1",
    ) -> None:
        super().__init__(name=name, ranks=ranks, rank=rank)
        self._diagnosis = diagnosis
        self._timeout_s = timeout_s
        self._store = store
        self._calls = 0
        self._error: str | None = None
        self._unfinished: list[_GlooTransfer] = []
        options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._timeout = timedelta(seconds=timeout_s)
        options._threads = 1
        options._devices = [ProcessGroupGloo.create_device(hostname=host)]
        prefix = PrefixStore(name, store)
        self._pg: Any = None
        self._pg = self._guard(
            "connect", None, lambda: ProcessGroupGloo(prefix, self.idx, self.size, options)
        )

    def broadcast(self, x: Tensor, source: int) -> Tensor:
        """gloo's own: the source sends to few members and these pass it on."""
        out = x if source == self.idx else torch.empty_like(x)
        data = as_bytes(out)
        if data.shape[0]:
            self._guard("broadcast", None, lambda: self._broadcast(data, source))
        return out

    def abort(self) -> None:
        if self._error is None:
            self._error = f"group {self.name!r}: aborted by rank {self.ranks[self.idx]}"
        if self._pg is not None:
            self._pg.abort()

    def close(self) -> None:
        self._error = self._error or f"group {self.name!r} is closed"
        self._pg = None

    # -- moving bytes ------------------------------------------------------------------------

    def _start(
        self,
        chunks: Iterable[Parts],
        stage: str,
        sources: Sequence[int],
        out: Tensor | None = None,
        sizes: Sequence[int] | None = None,
    ) -> "_GlooTransfer":
        parts: list[list[Tensor]] = [[] for _ in self.ranks]
        for chunk in chunks:
            check_parts(chunk, self.size)
            for mine, part in zip(parts, chunk, strict=True):
                if part is not None:
                    mine.append(part)
        transfer = _GlooTransfer(self, [joined(mine) for mine in parts], stage, out, sizes)
        self._unfinished.append(transfer)
        return transfer

    def _finish_until(self, transfer: "_GlooTransfer", timeout_s: float | None) -> None:
        """Exchanges in the order in which they started, which is the same on every member."""
        while self._unfinished:
            first = self._unfinished.pop(0)
            self._guard(first.stage, timeout_s, lambda: first.move(timeout_s))  # noqa: B023
            if first is transfer:
                return

    def all_to_all_bytes(
        self,
        data: Tensor,
        out: Tensor,
        send_bytes: list[int],
        recv_bytes: list[int],
        timeout_s: float | None,
    ) -> None:
        options = AllToAllOptions()
        options.timeout = timedelta(seconds=timeout_s or self._timeout_s)
        self._wait(self._pg.alltoall_base(out, data, recv_bytes, send_bytes, options))

    def _broadcast(self, data: Tensor, source: int) -> None:
        options = BroadcastOptions()
        options.rootRank = source
        options.timeout = timedelta(seconds=self._timeout_s)
        self._wait(self._pg.broadcast([data], options))

    def _wait(self, work: Any) -> None:
        """In slices, so that an abort from another thread is seen; gloo keeps the deadline."""
        while True:
            try:
                work.wait(timedelta(seconds=_SLICE_S))
                return
            except RuntimeError:
                if self._error is not None:
                    raise
                if work.is_completed():  # by itself, not because the slice is over
                    work.wait()
                    return

    # -- failure -----------------------------------------------------------------------------

    def _guard(self, operation: str, timeout_s: float | None, call: Callable[[], Any]) -> Any:
        if self._error is not None:
            raise CommError(self._error)
        self._calls += 1
        try:
            return call()
        except RuntimeError as error:
            text = str(error)
            if self._error is not None:
                raise CommError(self._error) from error
            self._error = f"group {self.name!r}: unusable after an error in {operation}"
            if any(words in text.lower() for words in _TIMEOUT_WORDS):
                raise self._diagnosis.timed_out(
                    group=self.name,
                    operation=operation,
                    silent=self._silent_peers(),
                    deadline_s=timeout_s or self._timeout_s,
                ) from error
            others = [self.ranks[i] for i in self._others]  # gloo does not tell which
            raise self._diagnosis.lost(
                group=self.name, operation=operation, peers=others, reason=text
            ) from error

    def _silent_peers(self) -> list[int]:
        """World ranks that have not noted this call as failed: they are not in it."""
        key = f"{self.name}/late/{self._calls}"
        try:
            self._store.set(f"{key}/{self.idx}", "1")
            time.sleep(_NOTE_S)
            return [
                rank for i, rank in enumerate(self.ranks) if not self._store.check([f"{key}/{i}"])
            ]
        except RuntimeError:  # the store is gone too
            return []


class _GlooTransfer:
    """Bytes to each member, sent and received when somebody waits for them."""

    def __init__(
        self,
        group: GlooGroup,
        sent: list[Tensor],
        stage: str,
        out: Tensor | None,
        sizes: Sequence[int] | None,
    ) -> None:
        self._group, self.stage = group, stage
        self._sent, self._out, self._sizes = sent, out, sizes
        self._received: list[Tensor] | None = None
        self.waits = [0.0] * group.size
        self.finished = 0.0

    def wait(self, timeout_s: float | None = None) -> list[Tensor]:
        start = time.perf_counter()
        if self._received is None:
            self._group._finish_until(self, timeout_s)
        assert self._received is not None
        waited = max(0.0, self.finished - start)
        self.waits = [0.0 if i == self._group.idx else waited for i in range(self._group.size)]
        return self._received

    def move(self, timeout_s: float | None) -> None:
        group, idx = self._group, self._group.idx
        mine = self._sent[idx]
        send_bytes = [part.shape[0] for part in self._sent]
        send_bytes[idx] = 0
        sizes, out = self._sizes, self._out
        if sizes is None:
            counts, their_counts = torch.tensor(send_bytes), torch.empty(group.size).long()
            ones = [1] * group.size
            group.all_to_all_bytes(counts, their_counts, ones, ones, timeout_s)
            sizes = [int(count) for count in their_counts]
        recv_bytes = list(sizes)
        recv_bytes[idx] = 0
        received = torch.empty(sum(recv_bytes), dtype=torch.uint8)
        others = [part for i, part in enumerate(self._sent) if i != idx]
        group.all_to_all_bytes(torch.cat(others), received, send_bytes, recv_bytes, timeout_s)
        parts = list(received.split(recv_bytes))
        if out is not None:
            for i, slot in enumerate(out.split(list(sizes))):
                if i != idx:
                    slot.copy_(parts[i])
        parts[idx] = mine
        self._sent = []
        self._received = parts
        self.finished = time.perf_counter()
