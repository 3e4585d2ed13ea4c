"""Collectives between hosts, over one TCP connection between every two members.

Whoever waits moves the bytes himself: a small exchange hands nothing to another thread and takes tens
of microseconds. Only when an exchange is left under way with a good part of its bytes still to move
does a background thread move them, until somebody waits again. Receives end in the tensor that the
caller gets; nothing is announced before it is sent, so both directions of a link run at once.
"""

import os
import select
import threading
import time
from collections.abc import Iterable, Sequence

from torch import Tensor

from comms.collectives import ExchangeCollectives, Parts
from comms.diagnosis import Diagnosis
from comms.group import CommError
from comms.mesh import MissingMembersError, connect_mesh
from comms.sizes import check_parts, joined
from comms.store import Store
from comms.tcp_peer import Inbox, Peer

_BACKGROUND_BYTES = 64 * 1024  # an exchange with less left to move waits for its wait
_SLICE_S = 0.1  # of one wait in the kernel; nothing depends on it
_LOCK_S = 0.5  # abort does not wait longer for whoever moves bytes
_JOIN_S = 1.0


class TcpGroup(ExchangeCollectives):
    """A Group over TCP; collective constructor. `host` is the local address to listen on."""

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
        self._error: str | None = None
        self._calls = 0
        self._peers = self._connect(store, host)
        self._lock = threading.Lock()  # whoever holds it moves bytes
        self._by_fd = {peer.fd: peer for peer in self._peers.values()}
        self._watched = dict.fromkeys(self._by_fd, select.EPOLLIN)
        self._alarm = os.eventfd(0, os.EFD_NONBLOCK)  # wakes every wait, for good
        self._epoll = select.epoll()
        self._epoll.register(self._alarm, select.EPOLLIN)
        for fd, events in self._watched.items():
            self._epoll.register(fd, events)
        self._under_way: list[_TcpTransfer] = []
        self._num_waiting = 0
        self._work = threading.Event()  # there is some for the background thread
        self._background: threading.Thread | None = None

    def abort(self) -> None:
        if self._error is not None:
            return
        reason = f"aborted by rank {self.ranks[self.idx]}"
        self._error = f"group {self.name!r}: {reason}"
        self._hang_up(reason)

    def close(self) -> None:
        with self._lock:  # or the background thread might miss the call to work, its last
            self._error = self._error or f"group {self.name!r} is closed"
            self._work.set()
        if not self._peers:
            return
        os.eventfd_write(self._alarm, 1)
        if self._background is not None:
            self._background.join(_JOIN_S)
        for peer in self._peers.values():
            peer.sock.close()
        self._peers, self._by_fd = {}, {}
        self._epoll.close()
        os.close(self._alarm)

    def start_exchange(self, chunks: Iterable[Sequence[Tensor]], stage: str) -> "_TcpTransfer":
        transfer = self._start(chunks, stage, self._others)
        self._leave_to_background(transfer)
        return transfer

    # -- one operation -----------------------------------------------------------------------

    def _start(
        self,
        chunks: Iterable[Parts],
        stage: str,
        sources: Sequence[int],
        out: Tensor | None = None,
        sizes: Sequence[int] | None = None,
    ) -> "_TcpTransfer":
        slots = None if out is None or sizes is None else out.split(list(sizes))
        with self._lock:
            self._raise_if_unusable()
            self._calls += 1
            transfer = _TcpTransfer(self, self._calls, stage)
            self._under_way.append(transfer)
            for source in sources:
                inbox = Inbox(self._calls, transfer.name, None if slots is None else slots[source])
                transfer.inboxes[source] = inbox
                peer = self._peers[source]
                self._watch(peer, reading=peer.expect(inbox))
        try:
            self._send_all(transfer, chunks)
        except BaseException:
            self.abort()  # the members wait for chunks that never come
            raise
        return transfer

    def _send_all(self, transfer: "_TcpTransfer", chunks: Iterable[Parts]) -> None:
        """A frame per part; the last one is empty where we cannot know which one is the last."""
        num_chunks = len(chunks) if isinstance(chunks, Sequence) else None
        receivers = set(self._others)
        for k, chunk in enumerate(chunks):
            check_parts(chunk, self.size)
            mine = chunk[self.idx]
            if mine is not None:
                transfer.mine.append(mine)
            receivers = {i for i in self._others if chunk[i] is not None}
            self._send(transfer, chunk, receivers, last=k + 1 == num_chunks)
        if not num_chunks:
            self._send(transfer, [None] * self.size, receivers, last=True)

    def _send(
        self, transfer: "_TcpTransfer", chunk: Parts, receivers: set[int], last: bool
    ) -> None:
        with self._lock:
            self._raise_if_unusable()
            for step in range(1, self.size):  # not everybody to the same member first
                j = (self.idx + step) % self.size
                part, peer = chunk[j], self._peers[j]
                if j in receivers and (last or (part is not None and part.shape[0])):
                    peer.send(transfer.call, transfer.name, part, last)
                    transfer.leaves_at[j] = peer.queued
                    transfer.num_sent += 0 if part is None else part.shape[0]
                    self._watch(peer)

    def finish(self, transfer: "_TcpTransfer", timeout_s: float | None) -> None:
        """Move bytes until all of this transfer have left and come."""
        limit_s = timeout_s or self._timeout_s
        deadline = time.perf_counter() + limit_s
        ready: list[tuple[int, int]] = []
        with self._lock:
            self._num_waiting += 1  # from here on the background thread takes nothing away
        try:
            while True:
                with self._lock:
                    self._raise_if_unusable()
                    self._handle(ready)
                    if self._is_done(transfer):
                        return
                    lost = self._lost(transfer)
                if lost:
                    raise self._give_up(self._error_of(lost, transfer.stage))
                left = deadline - time.perf_counter()
                if left <= 0:
                    raise self._late(transfer, limit_s)
                ready = self._epoll.poll(min(left, _SLICE_S))
        finally:
            with self._lock:
                self._num_waiting -= 1
                if transfer in self._under_way:
                    self._under_way.remove(transfer)
                if self._background is not None and self._under_way:
                    self._work.set()

    def _is_done(self, transfer: "_TcpTransfer") -> bool:
        return all(inbox.done for inbox in transfer.inboxes.values()) and all(
            self._peers[j].sent >= end for j, end in transfer.leaves_at.items()
        )

    def _unfinished(self, transfer: "_TcpTransfer") -> list[int]:
        """Members of which bytes are missing, or which do not take ours."""
        silent = {j for j, inbox in transfer.inboxes.items() if not inbox.done}
        silent |= {j for j, end in transfer.leaves_at.items() if self._peers[j].sent < end}
        return sorted(silent)

    # -- moving bytes, under the lock --------------------------------------------------------

    def _handle(self, ready: Sequence[tuple[int, int]]) -> None:
        for fd, events in ready:
            peer = self._by_fd.get(fd)
            if peer is None or fd not in self._watched:
                continue
            if events & select.EPOLLOUT:
                peer.flush()
            reading = True
            if events & ~select.EPOLLOUT:
                reading = peer.receive()
            self._watch(peer, reading)

    def _watch(self, peer: Peer, reading: bool | None = None) -> None:
        """Ask the kernel for what this peer needs: room to send, bytes that somebody expects."""
        before = self._watched.get(peer.fd)
        if before is None:
            return
        if peer.fault is not None:
            del self._watched[peer.fd]
            self._epoll.unregister(peer.fd)
            return
        if reading is None:
            reading = bool(before & select.EPOLLIN)
        events = (select.EPOLLIN if reading else 0) | (select.EPOLLOUT if peer.unsent else 0)
        if events != before:
            self._epoll.modify(peer.fd, events)
            self._watched[peer.fd] = events

    # -- the background thread ---------------------------------------------------------------

    def _leave_to_background(self, transfer: "_TcpTransfer") -> None:
        with self._lock:
            unsent = sum(peer.unsent for peer in self._peers.values())
            if unsent < _BACKGROUND_BYTES and transfer.num_sent < _BACKGROUND_BYTES:
                return
        if self._background is None:
            self._background = threading.Thread(
                target=self._move_in_background, name=f"expertmesh-tcp-{self.name}", daemon=True
            )
            self._background.start()
        self._work.set()

    def _move_in_background(self) -> None:
        while True:
            self._work.wait()
            if self._error is not None:
                return
            ready = self._epoll.poll(_SLICE_S)
            with self._lock:
                if self._error is not None:
                    return
                if self._num_waiting or all(self._is_done(t) for t in self._under_way):
                    self._work.clear()
                else:
                    self._handle(ready)

    # -- failure -----------------------------------------------------------------------------

    def _connect(self, store: Store, host: str) -> dict[int, Peer]:
        try:
            sockets = connect_mesh(store, self.name, self.idx, self.size, host, self._timeout_s)
        except MissingMembersError as error:
            ranks = [self.ranks[i] for i in error.missing]
            self._error = f"group {self.name!r}: never connected"
            if error.reason:
                raise self._diagnosis.lost(
                    group=self.name, operation="connect", peers=ranks, reason=error.reason
                ) from error
            raise self._diagnosis.timed_out(
                group=self.name, operation="connect", silent=ranks, deadline_s=self._timeout_s
            ) from error
        me = self.ranks[self.idx]
        return {i: Peer(sock, self.ranks[i], me) for i, sock in sockets.items()}

    def _raise_if_unusable(self) -> None:
        if self._error is not None:
            raise CommError(self._error)

    def _lost(self, transfer: "_TcpTransfer") -> list[Peer]:
        """Peers without which this transfer cannot end, and those that aborted."""
        needed = [self._peers[j] for j in self._unfinished(transfer)]
        lost = [peer for peer in needed if peer.fault is not None]
        return lost or [peer for peer in self._peers.values() if peer.aborted]

    def _error_of(self, lost: Sequence[Peer], operation: str) -> CommError:
        for peer in lost:
            if peer.disagrees:
                return self._diagnosis.disagreed(group=self.name, reason=peer.fault or "")
        reasons = dict.fromkeys(peer.fault or "" for peer in lost)
        return self._diagnosis.lost(
            group=self.name,
            operation=operation,
            peers=[peer.rank for peer in lost],
            reason="; ".join(reasons),
        )

    def _late(self, transfer: "_TcpTransfer", limit_s: float) -> CommError:
        """The peers' own deadlines are near: they are not told, and find out who it was."""
        silent = self._unfinished(transfer)
        waiting = {self.ranks[j]: i for j, i in transfer.inboxes.items() if not i.done}
        self._error = f"group {self.name!r}: unusable after a timeout in {transfer.stage}"
        return self._diagnosis.timed_out(
            group=self.name,
            operation=transfer.stage,
            silent=[self.ranks[j] for j in silent],
            deadline_s=limit_s,
            progress={rank: (inbox.received, inbox.expected) for rank, inbox in waiting.items()},
        )

    def _give_up(self, error: CommError) -> CommError:
        self._error = str(error)
        self._hang_up(self._error)
        return error

    def _hang_up(self, reason: str) -> None:
        """End every connection, with the reason where possible, and wake whoever waits."""
        held = self._lock.acquire(timeout=_LOCK_S)
        try:
            for peer in self._peers.values():
                if held:
                    peer.send_abort(reason)
                peer.hang_up()
            if self._peers:
                os.eventfd_write(self._alarm, 1)
        finally:
            if held:
                self._lock.release()


class _TcpTransfer:
    """One operation of one member: what it expects, and where its own bytes end."""

    def __init__(self, group: TcpGroup, call: int, stage: str) -> None:
        self._group, self.call, self.stage = group, call, stage
        self.name = stage.encode()[:255]
        self.inboxes: dict[int, Inbox] = {}
        self.leaves_at: dict[int, int] = {}  # by member: bytes sent to it when mine are among them
        self.mine: list[Tensor] = []
        self.num_sent = 0
        self.waits: list[float] = []
        self.finished = 0.0

    def wait(self, timeout_s: float | None = None) -> list[Tensor]:
        start = time.perf_counter()
        self._group.finish(self, timeout_s)
        arrived = {j: inbox.finished for j, inbox in self.inboxes.items()}
        members = range(self._group.size)
        self.waits = [max(0.0, arrived.get(j, start) - start) for j in members]
        self.finished = max(arrived.values(), default=time.perf_counter())
        parts = {j: joined(inbox.parts) for j, inbox in self.inboxes.items()}
        parts[self._group.idx] = joined(self.mine)
        return [parts[j] if j in parts else joined([]) for j in members]
