"""TCP between hosts of a testbed, from the test's own process. Sockets stay where they were opened."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from simulations.testbed import Testbed

PORT = 5000
DEADLINE_S = 30.0


@contextmanager
def listening(testbed: Testbed, host: int) -> Iterator[socket.socket]:
    def listen() -> socket.socket:
        return socket.create_server((testbed.address(host), PORT))

    server = testbed.call(host, listen)
    server.settimeout(DEADLINE_S)
    with server:
        yield server


def connect(
    testbed: Testbed, source: int, host: int, timeout_s: float = DEADLINE_S
) -> socket.socket:
    address = (testbed.address(host), PORT)
    return testbed.call(source, lambda: socket.create_connection(address, timeout=timeout_s))


@contextmanager
def connected(
    testbed: Testbed, source: int, host: int
) -> Iterator[tuple[socket.socket, socket.socket]]:
    """A socket in host `source` and its peer in host `host`."""
    with listening(testbed, host) as server, connect(testbed, source, host) as ours:
        theirs, _ = server.accept()
        theirs.settimeout(DEADLINE_S)
        with theirs:
            yield ours, theirs


def receive(sock: socket.socket, num_bytes: int) -> None:
    left = num_bytes
    while left:
        chunk = sock.recv(min(left, 1 << 16))
        assert chunk, f"the connection ended {left} bytes early"
        left -= len(chunk)


def seconds_to_send(pairs: list[tuple[socket.socket, socket.socket]], num_bytes: int) -> float:
    """Send num_bytes over each (sender, receiver) at once; seconds until the last has come."""
    senders = [
        threading.Thread(target=sender.sendall, args=(bytes(num_bytes),)) for sender, _ in pairs
    ]
    start = time.monotonic()
    for thread in senders:
        thread.start()
    receivers = [
        threading.Thread(target=receive, args=(receiver, num_bytes)) for _, receiver in pairs
    ]
    for thread in receivers:
        thread.start()
    for thread in [*senders, *receivers]:
        thread.join(DEADLINE_S)
        assert not thread.is_alive()
    return time.monotonic() - start
