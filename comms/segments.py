"""Shared memory of one group: every rank owns a segment that its peers can read.

A segment is an anonymous memfd which peers map through /proc/<pid>/fd/<fd>, so nothing has a name
in /dev/shm and nothing can be left behind. Round s uses half s % 2. To *post* round s a rank writes
its half and then sets its flag to s, which also says "I have read all I need of round s - 1". So a
rank may overwrite a half once every peer's flag has reached s - 1: one wait, usually over already.

    segment:  token | flag | abort | half 0: op, total, offsets.. , data | half 1: ...

x86-64 keeps stores in order; elsewhere two lock operations around the flag act as the fence.
"""

import mmap
import os
import platform
import secrets
import select
import threading
import time
from collections.abc import Sequence
from datetime import timedelta

import torch

from comms.group import CommError, CommTimeout
from comms.store import Store

_TOKEN, _FLAG, _ABORT, _HALVES = 0, 8, 16, 24  # in 8-byte words: one cache line each
_SPIN_S = 300e-6  # a peer in step arrives within this; then sleeps save the core for it
_MAX_SLEEP_S = 2e-3
_IN_ORDER = platform.machine() in ("x86_64", "AMD64")


class Segments:
    """My segment and my peers', the flags, and the waiting."""

    def __init__(
        self,
        *,
        name: str,
        ranks: tuple[int, ...],
        idx: int,
        store: Store,
        timeout_s: float,
        capacity: int,
    ) -> None:
        if not hasattr(os, "memfd_create"):
            raise CommError("shared-memory groups need Linux; use node_backend: gloo")
        self.name, self.ranks, self.idx, self.timeout_s = name, ranks, idx, timeout_s
        self.capacity = capacity  # bytes of data per half, a multiple of 64
        self.peers = tuple(i for i in range(len(ranks)) if i != idx)
        self._header_words = -(-(3 + len(ranks)) // 8) * 8
        self._half_words = self._header_words + capacity // 8
        self._num_bytes = (_HALVES + 2 * self._half_words) * 8
        self._error: str | None = None
        self._fence_lock = threading.Lock()
        self._seq = 0
        self._pidfds: dict[int, int] = {}
        self._poll = select.poll()
        self.maps: list[mmap.mmap] = []
        self.words: list[memoryview[int]] = []
        self.memory: list[torch.Tensor] = []
        self._connect(store)

    # -- one round ---------------------------------------------------------------------------

    def begin(self, operation: str, timeout_s: float | None = None) -> int:
        """Start the next round: returns the half that may now be written."""
        self._seq += 1
        self.wait(self.peers, operation, timeout_s, lag=1)
        return self.half

    def set_header(self, half: int, op: int, total: int, offsets: Sequence[int] = ()) -> None:
        word = _HALVES + half * self._half_words
        words = self.words[self.idx]
        words[word], words[word + 1] = op, total
        for i, offset in enumerate(offsets):
            words[word + 2 + i] = offset

    def header(self, peer: int) -> tuple[int, int]:
        """(op, total) that `peer` posted in the current round."""
        word = _HALVES + self.half * self._half_words
        return self.words[peer][word], self.words[peer][word + 1]

    def offset(self, peer: int, i: int) -> int:
        return self.words[peer][_HALVES + self.half * self._half_words + 2 + i]

    def post(self) -> None:
        self._fence()
        self.words[self.idx][_FLAG] = self._seq

    def wait(
        self, peers: Sequence[int], operation: str, timeout_s: float | None = None, lag: int = 0
    ) -> None:
        """Until the flags of `peers` have reached the current round - lag."""
        if self._error is not None:
            raise CommError(self._error)
        words, seq = self.words, self._seq - lag
        for peer in peers:
            if words[peer][_FLAG] < seq:
                self._wait_slowly(peers, seq, operation, timeout_s or self.timeout_s)
                break
        self._fence()

    @property
    def half(self) -> int:
        """The half of the current round."""
        return self._seq & 1

    def data_range(self, half: int) -> int:
        """Byte offset of a half's data in every segment."""
        return (_HALVES + half * self._half_words + self._header_words) * 8

    # -- failure -----------------------------------------------------------------------------

    def fail(self, message: str) -> CommError:
        """Remember why this group is unusable, tell the peers, and give the error to raise."""
        self.abort(message)
        return CommError(message)

    def abort(self, message: str | None = None) -> None:
        if self._error is None:
            rank = self.ranks[self.idx]
            self._error = message or f"group {self.name!r}: aborted by rank {rank}"
        if self.words:
            self.words[self.idx][_ABORT] = 1

    def close(self) -> None:
        self._error = self._error or f"group {self.name!r} is closed"
        for pidfd in self._pidfds.values():
            os.close(pidfd)
        self._pidfds = {}
        self.words, self.memory, self.maps = [], [], []

    def _wait_slowly(
        self, peers: Sequence[int], seq: int, operation: str, timeout_s: float
    ) -> None:
        start = time.monotonic()
        while any(self.words[peer][_FLAG] < seq for peer in peers):
            waited = time.monotonic() - start
            if waited < _SPIN_S:
                os.sched_yield()
                continue
            if self._error is not None:
                raise CommError(self._error)
            silent = [peer for peer in peers if self.words[peer][_FLAG] < seq]
            self._raise_if_hopeless(silent, operation)
            if silent and waited > timeout_s:
                self._error = f"group {self.name!r}: unusable after a timeout in {operation}"
                raise CommTimeout(
                    group=self.name,
                    operation=operation,
                    rank=self.ranks[self.idx],
                    silent=[self.ranks[peer] for peer in silent],
                    deadline_s=timeout_s,
                )
            time.sleep(min(waited / 10, _MAX_SLEEP_S))

    def _raise_if_hopeless(self, silent: Sequence[int], operation: str) -> None:
        me = self.ranks[self.idx]
        for peer in self.peers:
            if self.words[peer][_ABORT]:
                raise self.fail(
                    f"group {self.name!r}: aborted by rank {self.ranks[peer]} "
                    f"while rank {me} waited in {operation}"
                )
        ended = {fd for fd, _ in self._poll.poll(0)}
        dead = [peer for peer in silent if self._pidfds[peer] in ended]
        if dead:
            names = [self.ranks[peer] for peer in dead]
            raise self.fail(
                f"group {self.name!r}: the process of rank(s) {names} is gone; "
                f"rank {me} waited for them in {operation}"
            )

    def _fence(self) -> None:
        if not _IN_ORDER:
            for _ in range(2):  # release, then acquire: neither side can pass both
                self._fence_lock.acquire()
                self._fence_lock.release()

    # -- connecting --------------------------------------------------------------------------

    def _connect(self, store: Store) -> None:
        fd = os.memfd_create(f"expertmesh-{self.name}")
        try:
            os.ftruncate(fd, self._num_bytes)
            own = mmap.mmap(fd, self._num_bytes)
            token = secrets.randbits(62) | 1
            memoryview(own).cast("q")[_TOKEN] = token
            store.set(self._key(self.idx), f"{os.getpid()} {fd} {token}")
            self.maps = [own if i == self.idx else self._map(i, store) for i in self._all()]
            self.words = [memoryview(m).cast("q") for m in self.maps]
            self.memory = [torch.frombuffer(m, dtype=torch.uint8) for m in self.maps]
            self.begin("connect")
            self.post()
            self.wait(self.peers, "connect")  # all have mapped my segment: the fd may go
        finally:
            os.close(fd)

    def _map(self, peer: int, store: Store) -> mmap.mmap:
        try:
            store.wait([self._key(peer)], timedelta(seconds=self.timeout_s))
        except RuntimeError as error:
            silent = [self.ranks[i] for i in self.peers if not store.check([self._key(i)])]
            raise CommTimeout(
                group=self.name,
                operation="connect",
                rank=self.ranks[self.idx],
                silent=silent,
                deadline_s=self.timeout_s,
            ) from error
        pid, fd, token = (int(word) for word in store.get(self._key(peer)).split())
        not_here = CommError(
            f"group {self.name!r}: rank {self.ranks[self.idx]} cannot map the memory of rank "
            f"{self.ranks[peer]} (pid {pid}); ranks of one node must share host, user and pid "
            "namespace, else use node_backend: gloo"
        )
        try:
            peer_fd = os.open(f"/proc/{pid}/fd/{fd}", os.O_RDWR)
        except OSError as error:
            raise not_here from error
        try:
            mapped = mmap.mmap(peer_fd, self._num_bytes)
        except (OSError, ValueError) as error:
            raise not_here from error
        finally:
            os.close(peer_fd)
        if memoryview(mapped).cast("q")[_TOKEN] != token:
            raise not_here
        self._pidfds[peer] = os.pidfd_open(pid)
        self._poll.register(self._pidfds[peer], select.POLLIN)
        return mapped

    def _all(self) -> range:
        return range(len(self.ranks))

    def _key(self, peer: int) -> str:
        return f"{self.name}/{peer}"
