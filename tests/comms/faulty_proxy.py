"""A TCP proxy that spoils what a server says: where a transfer meets every fault of a network.

Each connection takes the next fault from `faults`, if there is one, and is otherwise passed through.
"""

import socket
import threading
from collections import deque
from contextlib import suppress
from typing import NamedTuple


class Fault(NamedTuple):
    """What happens to the bytes from the server once `after` of them have passed.

    cut: the connection is closed. stall: no more come, but it stays open. flip: one bit of the next
    byte changes.
    """

    kind: str
    after: int


class FaultyProxy:
    def __init__(self, target_port: int) -> None:
        self.faults: deque[Fault] = deque()
        self.refuses = False
        self._target_port = target_port
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.port = self._listener.getsockname()[1]
        self._open: set[socket.socket] = set()
        self._threads = [threading.Thread(target=self._accept, daemon=True, name="proxy")]
        self._threads[0].start()

    def close(self) -> None:
        _hang_up(self._listener)
        self._listener.close()
        for sock in list(self._open):
            _hang_up(sock)
        for thread in self._threads:
            thread.join()

    def __enter__(self) -> "FaultyProxy":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _accept(self) -> None:
        while True:
            try:
                caller, _ = self._listener.accept()
            except OSError:
                return
            if self.refuses:
                caller.close()
                continue
            thread = threading.Thread(
                target=self._connect, args=(caller,), daemon=True, name="proxy"
            )
            self._threads = [t for t in self._threads if t.is_alive()] + [thread]
            thread.start()

    def _connect(self, caller: socket.socket) -> None:
        fault = self.faults.popleft() if self.faults else None
        try:
            server = socket.create_connection(("127.0.0.1", self._target_port))
        except OSError:
            caller.close()
            return
        with caller, server:
            self._open |= {caller, server}
            there = threading.Thread(target=_pass, args=(caller, server, None), daemon=True)
            there.start()
            _pass(server, caller, fault)
            if fault is None or fault.kind != "stall":
                _hang_up(caller)
            _hang_up(server)
            there.join()  # while stalled: until the caller gives up
            self._open -= {caller, server}


def _pass(source: socket.socket, sink: socket.socket, fault: Fault | None) -> None:
    passed = 0
    with suppress(OSError):
        while data := source.recv(1 << 16):
            if fault is not None and passed + len(data) > fault.after >= passed:
                here = fault.after - passed
                if fault.kind != "flip":
                    sink.sendall(data[:here])
                    return
                data = data[:here] + bytes([data[here] ^ 1]) + data[here + 1 :]
            passed += len(data)
            sink.sendall(data)


def _hang_up(sock: socket.socket) -> None:
    with suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)
