"""Exchange between GPUs by NCCL, which finds its way: NVLink, InfiniBand, RoCE or sockets.

The library that torch brought is called directly. An exchange is then one group of sends and receives on
the caller's own stream: no second stream to be joined inside a graph, no threads that end the process when
a peer is late. Deadlines are ours (`comms/rail_watch.py`).
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from comms.group import CommError, CommTimeout
from comms.meeting import meet
from comms.store import Store

_UINT8 = 1
_CLOSING_S, _PATIENCE_S = 2.0, 1.0


class NcclRail:
    """A `Rail`. Collective constructor: it returns when every member is connected to every other.

    ranks: of the world, which errors name; idx: mine among them. Raises RuntimeError without NCCL,
    CommTimeout for members that did not come, CommError where NCCL fails.
    """

    def __init__(
        self,
        store: Store,
        idx: int,
        ranks: Sequence[int],
        device: torch.device,
        *,
        name: str = "rail",
        timeout_s: float = 60.0,
    ) -> None:
        self._library = _library()
        self.idx, self.size, self.ranks, self.name = idx, len(ranks), tuple(ranks), name
        self._device = device
        self._comm = ctypes.c_void_p()
        self._lock, self._is_aborted = threading.Lock(), threading.Event()
        unique = _UniqueId()
        if idx == 0:
            self._call("ncclGetUniqueId", ctypes.byref(unique))
        words = meet(store, ranks[idx], ranks, bytes(unique).hex(), name=name, timeout_s=timeout_s)
        self._within(
            timeout_s, lambda: self._connect(_UniqueId.from_buffer_copy(bytes.fromhex(words[0])))
        )

    def _connect(self, unique: _UniqueId) -> None:
        with torch.cuda.device(self._device):
            comm = ctypes.byref(self._comm)
            self._call("ncclCommInitRank", comm, self.size, unique, self.idx)
            # The first exchange connects, which a graph's capture could not.
            parts = [torch.zeros(16, dtype=torch.uint8, device=self._device) for _ in self.ranks]
            self.start([torch.empty_like(part) for part in parts], parts)
            torch.cuda.current_stream(self._device).synchronize()

    def _within(self, timeout_s: float, connect: Callable[[], None]) -> None:
        """NCCL waits for good for a member that came and then died."""
        failures: list[Exception] = []

        def run() -> None:
            try:
                connect()
            except Exception as error:  # noqa: BLE001  (raised below)
                failures.append(error)

        thread = threading.Thread(target=run, name="expertmesh-nccl-connect", daemon=True)
        thread.start()
        thread.join(timeout_s)
        if failures:
            raise failures[0]
        if thread.is_alive():
            others = [rank for rank in self.ranks if rank != self.ranks[self.idx]]
            raise CommTimeout(
                group=self.name, operation="connect", rank=self.ranks[self.idx],
                silent=others, deadline_s=timeout_s, because="one of them ended meanwhile",
            )  # fmt: skip

    def start(self, outs: Sequence[Tensor], parts: Sequence[Tensor]) -> None:
        stream = ctypes.c_void_p(torch.cuda.current_stream(self._device).cuda_stream)
        with self._lock:
            if self._is_aborted.is_set():
                raise CommError(f"group {self.name!r}: aborted by rank {self.ranks[self.idx]}")
            self._call("ncclGroupStart")
            for step in range(1, self.size):
                to, source = (self.idx + step) % self.size, (self.idx - step) % self.size
                self._transfer("ncclSend", parts[to], to, stream)
                self._transfer("ncclRecv", outs[source], source, stream)
            self._call("ncclGroupEnd")

    def _transfer(self, function: str, x: Tensor, peer: int, stream: ctypes.c_void_p) -> None:
        if x.nbytes:
            address, size = ctypes.c_void_p(x.data_ptr()), ctypes.c_size_t(x.nbytes)
            self._call(function, address, size, _UINT8, peer, self._comm, stream)

    def finish(self) -> None:
        """Nothing: it is the same stream."""

    def abort(self) -> None:
        """Kernels under way end at once; NCCL itself waits for graphs that hold some, in a thread."""
        if self._is_aborted.is_set():
            return
        self._is_aborted.set()
        self._closing = threading.Thread(
            target=self._give_up, name="expertmesh-nccl-abort", daemon=True
        )
        self._closing.start()

    def _give_up(self) -> None:
        # Who is in the library with this communicator leaves it first, unless stuck; nobody enters again.
        if self._lock.acquire(timeout=_PATIENCE_S):
            self._lock.release()
        self._library.ncclCommAbort(self._comm)  # there is nobody to tell of an error

    def close(self) -> None:
        """Call it when all members are past their last exchange, and graphs with some are gone."""
        self.abort()
        self._closing.join(_CLOSING_S)

    def _call(self, function: str, *arguments: Any) -> None:
        result = getattr(self._library, function)(*arguments)
        if result:
            text = self._library.ncclGetErrorString(result).decode()
            more = self._library.ncclGetLastError(None)
            text += f" ({more.decode().strip()})" if more else ""
            raise CommError(f"group {self.name!r}: {function} failed: {text}")


class _UniqueId(ctypes.Structure):
    _fields_ = [("bytes", ctypes.c_uint8 * 128)]


@cache
def _library() -> Any:
    """Raises RuntimeError where there is none."""
    try:
        library: Any = ctypes.CDLL("libnccl.so.2")  # torch has loaded it, so its place is known
    except OSError:
        raise RuntimeError("NCCL (libnccl.so.2) was not found") from None
    pointer, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    library.ncclCommInitRank.argtypes = [pointer, number, _UniqueId, number]
    transfer = [pointer, size, number, number, pointer, pointer]
    library.ncclSend.argtypes = library.ncclRecv.argtypes = transfer
    library.ncclCommAbort.argtypes = library.ncclGetLastError.argtypes = [pointer]
    library.ncclGetErrorString.restype = library.ncclGetLastError.restype = ctypes.c_char_p
    return library
