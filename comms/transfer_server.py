"""Serves the weights in this rank's slots to ranks that fetch them (see `transfer.py`)."""

import logging
import socket
import threading
import time
import zlib
from collections.abc import Callable
from contextlib import suppress

from comms.budget import ByteBudget
from comms.mesh import tune
from comms.transfer_wire import (
    ANSWER,
    CHUNK,
    FETCH,
    REQUEST,
    SERVE,
    family_of,
    new_nonce,
    prove,
    proves,
)

CHUNK_BYTES = 128 * 1024
"""Sent, and received, in one go: so long may a transfer hold a core against a step."""

_HELLO_S = 5.0  # for a stranger to say who it is
_TAKE_S = 10.0  # for a peer to take one chunk
_PAUSE_S = 0.05  # after a connection that could not be taken
_MAX_CONNECTIONS = 64

logger = logging.getLogger(__name__)

ReadSlot = Callable[[int, int], memoryview | None]
"""(layer, slot) -> the bytes in that slot, which nobody writes to any more; None: it holds nothing."""


class TransferServer:
    """Serves the slots that `read` finds, from construction until `close`. Errors stay inside.

    bytes_per_s: of all transfers together, None = no limit.
    """

    def __init__(
        self,
        read: ReadSlot,
        *,
        host: str,
        secret: bytes,
        bytes_per_s: float | None = None,
        chunk_bytes: int = CHUNK_BYTES,
    ) -> None:
        self._read, self._secret, self._chunk_bytes = read, secret, chunk_bytes
        self._budget = ByteBudget(bytes_per_s)
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._serving: dict[socket.socket, threading.Thread] = {}
        self._listener = socket.create_server((host, 0), family=family_of(host), backlog=64)
        self.port: int = self._listener.getsockname()[1]
        self._accepting = _start(f"transfer-accept:{self.port}", self._accept)

    def close(self) -> None:
        """Cut what is being served, end all threads, free the port."""
        self._stop.set()
        _shutdown(self._listener)  # wakes `accept`
        self._accepting.join()
        self._listener.close()
        with self._lock:
            serving = list(self._serving.items())
            for sock, _ in serving:
                _shutdown(sock)
        for _, thread in serving:
            thread.join()

    def _accept(self) -> None:
        while not self._stop.is_set():
            try:
                sock, _ = self._listener.accept()
            except OSError:  # the caller hung up again, no file is left for it, or we are closing
                self._stop.wait(_PAUSE_S)
                continue
            with self._lock:
                if self._stop.is_set() or len(self._serving) >= _MAX_CONNECTIONS:
                    sock.close()
                else:
                    self._serving[sock] = _start(f"transfer-serve:{self.port}", self._serve, sock)

    def _serve(self, sock: socket.socket) -> None:
        try:
            tune(sock)
            self._answer(sock)
        except (OSError, ValueError) as error:
            logger.debug("a transfer ended early: %s", error)
        finally:
            with self._lock:
                del self._serving[sock]
                sock.close()

    def _answer(self, sock: socket.socket) -> None:
        mine = new_nonce()
        sock.settimeout(_HELLO_S)
        sock.sendall(mine)
        theirs, proof, layer, slot = REQUEST.unpack(_hello(sock, time.monotonic() + _HELLO_S))
        if not proves(proof, self._secret, FETCH, mine, theirs):
            raise ValueError("a caller does not know the secret")
        sock.settimeout(_TAKE_S)
        data = self._read(layer, slot)
        num_bytes = 0 if data is None else data.nbytes
        sock.sendall(ANSWER.pack(prove(self._secret, SERVE, mine, theirs), num_bytes))
        for start in range(0, num_bytes, self._chunk_bytes):
            assert data is not None
            chunk = data[start : start + self._chunk_bytes]
            if not self._budget.take(chunk.nbytes, self._stop):
                return
            sock.sendall(CHUNK.pack(chunk.nbytes, zlib.crc32(chunk)))
            sock.sendall(chunk)


def _hello(sock: socket.socket, deadline: float) -> bytes:
    """A whole request, however slowly it comes, until the deadline."""
    received = b""
    while len(received) < REQUEST.size:
        sock.settimeout(max(0.001, deadline - time.monotonic()))
        data = sock.recv(REQUEST.size - len(received))
        if not data:
            raise ValueError(f"a caller hung up after {len(received)} bytes")
        received += data
    return received


def _start(name: str, target: Callable[..., None], *args: object) -> threading.Thread:
    thread = threading.Thread(target=target, args=args, name=name, daemon=True)
    thread.start()
    return thread


def _shutdown(sock: socket.socket) -> None:
    with suppress(OSError):  # not connected, or gone already
        sock.shutdown(socket.SHUT_RDWR)
