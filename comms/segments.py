"""Shared memory of one group: every rank owns a segment that its peers can read.

A segment is an anonymous memfd which peers map through /proc/<pid>/fd/<fd>, so nothing has a name
in /dev/shm and nothing can be left behind. Round s uses half s % 2. To *post* round s a rank writes
its half and then sets its flag to s, which also says "I have read all I need of round s - 1". So a
rank may overwrite a half once every peer's flag has reached s - 1: one wait, usually over already.

    segment:  token | flag | abort | half 0: header, data | half 1: ...
    header:   crc of the operation's name, total, numbers.. , the name

x86-64 keeps stores in order; elsewhere two lock operations around the flag act as the fence.
"""

import mmap
import os
import platform
import secrets
import select
import threading
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta

import torch

from comms.blame import ranks_text
from comms.diagnosis import Diagnosis
from comms.group import CommError
from comms.store import Store

# (positions of silent peers) -> by world rank: bytes received, and of how many if announced
Progress = Callable[[Sequence[int]], Mapping[int, tuple[int, int | None]]]

_TOKEN, _FLAG, _ABORT, _HALVES = 0, 8, 16, 24  # in 8-byte words: one cache line each
_NAME_BYTES = 48  # of an operation, for the error when a peer called another
_SPIN_S = 300e-6  # a peer in step arrives within this; then sleeps save the core for it
_MAX_SLEEP_S = 2e-3
_NOBODY: Mapping[int, float] = {}
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
        diagnosis: Diagnosis,
        timeout_s: float,
        capacity: int,
    ) -> None:
        if not hasattr(os, "memfd_create"):
            raise CommError("shared-memory groups need Linux; use node_backend: gloo")
        self.name, self.ranks, self.idx, self.timeout_s = name, ranks, idx, timeout_s
        self.capacity = capacity  # bytes of data per half, a multiple of 64
        self.peers = tuple(i for i in range(len(ranks)) if i != idx)
        self._diagnosis = diagnosis
        self._numbers = 2 * len(ranks) + 1  # that a header can hold
        self._header_words = -(-(2 + self._numbers + _NAME_BYTES // 8) // 8) * 8
        self._half_words = self._header_words + capacity // 8
        self._num_bytes = (_HALVES + 2 * self._half_words) * 8
        self._error: str | None = None
        self._fence_lock = threading.Lock()
        self._seq = 0
        self._labels: dict[str, tuple[int, bytes]] = {}
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

    def set_header(
        self, half: int, operation: str, total: int, numbers: Sequence[int] = ()
    ) -> None:
        """Announce the current round: up to 2 * size + 1 `numbers` mean what the operation says."""
        crc, name = self._label(operation)
        word = _HALVES + half * self._half_words
        words = self.words[self.idx]
        words[word], words[word + 1] = crc, total
        word += 2
        for number in numbers:
            words[word] = number
            word += 1
        start = (_HALVES + half * self._half_words + 2 + self._numbers) * 8
        self.maps[self.idx][start : start + _NAME_BYTES] = name

    def checked_total(self, peer: int, operation: str) -> int:
        """`total` as `peer` announced it. Raises CommError if the peer called something else."""
        word = _HALVES + self.half * self._half_words
        words = self.words[peer]
        if words[word] != self._label(operation)[0]:
            start = (word + 2 + self._numbers) * 8
            name = (
                self.maps[peer][start : start + _NAME_BYTES].rstrip(b"\0").decode(errors="replace")
            )
            raise self.fail(
                f"rank {self.ranks[peer]} called {name} while "
                f"rank {self.ranks[self.idx]} called {operation}"
            )
        return words[word + 1]

    def numbers(self, peer: int, first: int, last: int) -> list[int]:
        """Of `peer`'s numbers of the current round, those at positions [first, last)."""
        word = _HALVES + (self._seq & 1) * self._half_words + 2
        return self.words[peer][word + first : word + last].tolist()

    def post(self) -> None:
        self._fence()
        self.words[self.idx][_FLAG] = self._seq

    def wait(
        self,
        peers: Sequence[int],
        operation: str,
        timeout_s: float | None = None,
        lag: int = 0,
        progress: Progress | None = None,
    ) -> Mapping[int, float]:
        """Until the flags of `peers` have reached the current round - lag.

        Returns the time.perf_counter() at which peers arrived; not of those that were there before.
        `progress` tells what had come from silent peers, for the error.
        """
        if self._error is not None:
            raise CommError(self._error)
        words, seq, arrived = self.words, self._seq - lag, _NOBODY
        for peer in peers:
            if words[peer][_FLAG] < seq:
                arrived = self._wait_slowly(
                    peers, seq, operation, timeout_s or self.timeout_s, progress
                )
                break
        self._fence()
        return arrived

    @property
    def half(self) -> int:
        """The half of the current round."""
        return self._seq & 1

    def data_range(self, half: int) -> int:
        """Byte offset of a half's data in every segment."""
        return (_HALVES + half * self._half_words + self._header_words) * 8

    # -- failure -----------------------------------------------------------------------------

    def fail(self, reason: str) -> CommError:
        """Make the group unusable because the members disagree; gives the error to raise."""
        return self._give_up(self._diagnosis.disagreed(group=self.name, reason=reason))

    def _give_up(self, error: CommError) -> CommError:
        self.abort(str(error))
        return error

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
        self,
        peers: Sequence[int],
        seq: int,
        operation: str,
        timeout_s: float,
        progress: Progress | None,
    ) -> Mapping[int, float]:
        arrived: dict[int, float] = {}
        missing = [peer for peer in peers if self.words[peer][_FLAG] < seq]
        start = time.perf_counter()
        while True:
            now = time.perf_counter()
            for peer in [peer for peer in missing if self.words[peer][_FLAG] >= seq]:
                missing.remove(peer)
                arrived[peer] = now
            if not missing:
                return arrived
            waited = now - start
            if waited < _SPIN_S:
                os.sched_yield()
                continue
            if self._error is not None:
                raise CommError(self._error)
            self._raise_if_hopeless(missing, operation)
            if waited > timeout_s:
                self._error = f"group {self.name!r}: unusable after a timeout in {operation}"
                raise self._diagnosis.timed_out(
                    group=self.name,
                    operation=operation,
                    silent=[self.ranks[peer] for peer in missing],
                    deadline_s=timeout_s,
                    progress=progress(missing) if progress is not None else None,
                )
            time.sleep(min(waited / 10, _MAX_SLEEP_S))

    def _raise_if_hopeless(self, missing: Sequence[int], operation: str) -> None:
        ended = {fd for fd, _ in self._poll.poll(0)}
        if dead := [self.ranks[peer] for peer in missing if self._pidfds[peer] in ended]:
            raise self._lost(operation, dead, "the process is gone", ended=True)
        if gave_up := [self.ranks[peer] for peer in self.peers if self.words[peer][_ABORT]]:
            raise self._lost(operation, gave_up, "aborted by " + ranks_text(gave_up))

    def _lost(
        self, operation: str, peers: Sequence[int], reason: str, ended: bool = False
    ) -> CommError:
        return self._give_up(
            self._diagnosis.lost(
                group=self.name, operation=operation, peers=peers, reason=reason, ended=ended
            )
        )

    def _label(self, operation: str) -> tuple[int, bytes]:
        """What stands for the operation in a header: a checksum, and as much of the name as fits."""
        label = self._labels.get(operation)
        if label is None:
            name = operation.encode()
            label = zlib.crc32(name), name[:_NAME_BYTES].ljust(_NAME_BYTES, b"\0")
            self._labels[operation] = label
        return label

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
            raise self._diagnosis.timed_out(
                group=self.name,
                operation="connect",
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
