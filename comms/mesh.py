"""One TCP connection between every two members of a group, made through the store.

Every member listens on a free port of its own and writes address and token to the store; each pair
is connected by the member with the higher index. The one that connects shows the other's token, the
answer shows its own: so both know that the other one can read the store. Whoever else connects, or
says something else, is dropped and does no harm.
"""

import hmac
import secrets
import selectors
import socket
import struct
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta

from comms.store import Store

_TOKEN_BYTES = 16
_HELLO = struct.Struct(f"<{_TOKEN_BYTES}sI")  # the listener's token, my index in the group
_CONGESTION_CONTROL = b"cubic"
_SO_CONGESTION = getattr(socket, "TCP_CONGESTION", None)


class MissingMembersError(Exception):
    """Members (by index in the group) that were not connected in time, or cannot be reached."""

    def __init__(self, missing: Sequence[int], reason: str = "") -> None:
        super().__init__(f"members {list(missing)} {reason}")
        self.missing = tuple(missing)
        self.reason = reason


def connect_mesh(
    store: Store, name: str, idx: int, size: int, host: str, timeout_s: float
) -> dict[int, socket.socket]:
    """My connection to every other member by index. All members call this; the last one frees all.

    Raises MissingMembersError after `timeout_s`, or at once when a member refuses the connection.
    """
    return _Mesh(store, name, idx, size, host, time.monotonic() + timeout_s).connect()


class _Mesh:
    def __init__(
        self, store: Store, name: str, idx: int, size: int, host: str, deadline: float
    ) -> None:
        self._store, self._name, self._idx, self._size = store, name, idx, size
        self._host, self._deadline = host, deadline
        self._token = secrets.token_bytes(_TOKEN_BYTES)
        self._selector = selectors.DefaultSelector()
        self._connected: dict[int, socket.socket] = {}
        self._open: set[socket.socket] = set()  # not authenticated yet

    def connect(self) -> dict[int, socket.socket]:
        family = socket.AF_INET6 if ":" in self._host else socket.AF_INET
        try:
            with socket.create_server(
                (self._host, 0), family=family, backlog=self._size + 64
            ) as listener:
                port = listener.getsockname()[1]
                self._store.set(self._key(self._idx), f"{self._host} {port} {self._token.hex()}")
                listener.setblocking(False)
                self._selector.register(listener, selectors.EVENT_READ, self._accept)
                for peer in range(self._idx):
                    self._call(peer)
                while missing := self._missing():
                    self._serve_until(self._deadline, missing)
        except BaseException:
            for sock in self._connected.values():
                sock.close()
            raise
        finally:
            for sock in self._open:
                sock.close()
            self._selector.close()
        for sock in self._connected.values():
            tune(sock)
        return self._connected

    def _missing(self) -> list[int]:
        return [i for i in range(self._size) if i != self._idx and i not in self._connected]

    def _serve_until(self, deadline: float, missing: Sequence[int]) -> None:
        left = deadline - time.monotonic()
        if left <= 0:
            raise MissingMembersError(missing)
        for key, _ in self._selector.select(min(left, 1.0)):
            key.data(key.fileobj)

    # -- those that I call --------------------------------------------------------------------

    def _call(self, peer: int) -> None:
        host, port, token = self._address_of(peer)
        sock = self._dial(peer, host, port)
        self._open.add(sock)
        sock.sendall(_HELLO.pack(token, self._idx))
        sock.setblocking(False)
        received = bytearray()

        def answer(_: socket.socket) -> None:
            if not _read(sock, received, _TOKEN_BYTES):
                raise MissingMembersError([peer], "hung up on connect")
            if len(received) == _TOKEN_BYTES:
                if not hmac.compare_digest(bytes(received), _answer_to(token, self._idx)):
                    raise MissingMembersError([peer], "answered with another token")
                self._keep(peer, sock)

        self._selector.register(sock, selectors.EVENT_READ, answer)

    def _address_of(self, peer: int) -> tuple[str, int, bytes]:
        key = self._key(peer)
        try:
            left = max(0.001, self._deadline - time.monotonic())
            self._store.wait([key], timedelta(seconds=left))
        except RuntimeError as error:
            absent = [
                i for i in self._missing() if i > self._idx or not self._store.check([self._key(i)])
            ]
            raise MissingMembersError(absent or [peer]) from error
        host, port, token = self._store.get(key).decode().split()
        return host, int(port), bytes.fromhex(token)

    def _dial(self, peer: int, host: str, port: int) -> socket.socket:
        """The listener is there already: a refusal means that its process has gone."""
        left = max(0.001, self._deadline - time.monotonic())
        try:
            return socket.create_connection((host, port), timeout=left)
        except TimeoutError as error:
            raise MissingMembersError([peer]) from error
        except OSError as error:
            raise MissingMembersError([peer], f"at {host}:{port}: {error}") from error

    # -- those that call me -------------------------------------------------------------------

    def _accept(self, listener: socket.socket) -> None:
        try:
            sock, _ = listener.accept()
        except OSError:  # hung up again
            return
        sock.setblocking(False)
        self._open.add(sock)
        received = bytearray()

        def hello(_: socket.socket) -> None:
            if not _read(sock, received, _HELLO.size):
                self._drop(sock)
            elif len(received) == _HELLO.size:
                token, peer = _HELLO.unpack(received)
                mine = hmac.compare_digest(token, self._token)
                if not mine or peer <= self._idx or peer not in self._missing():
                    self._drop(sock)
                    return
                with suppress(OSError):  # it went away: the first exchange will say so
                    sock.send(_answer_to(token, peer))
                self._keep(peer, sock)

        self._selector.register(sock, selectors.EVENT_READ, hello)

    def _keep(self, peer: int, sock: socket.socket) -> None:
        self._selector.unregister(sock)
        self._open.discard(sock)
        self._connected[peer] = sock

    def _drop(self, sock: socket.socket) -> None:
        self._selector.unregister(sock)
        self._open.discard(sock)
        sock.close()

    def _key(self, member: int) -> str:
        return f"{self._name}/{member}"


def _answer_to(token: bytes, caller: int) -> bytes:
    """What only the owner of `token` can say, and only to this caller."""
    return hmac.digest(token, str(caller).encode(), "sha256")[:_TOKEN_BYTES]


def _read(sock: socket.socket, received: bytearray, num_bytes: int) -> bool:
    """Add what has come, up to `num_bytes` in all; False when the other side hung up."""
    try:
        data = sock.recv(num_bytes - len(received))
    except BlockingIOError:
        return True
    except OSError:
        return False
    received += data
    return bool(data)


def tune(sock: socket.socket) -> None:
    """Small messages leave at once; long ones by a congestion control that fills the link.

    BBR paces each connection by its own estimate of the link. Bursts that share a link with the
    bursts of the way back and of other peers mislead it: it gave 138 of 200 Mbit/s where cubic gave
    202. Other choices of the host stay.
    """
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if _SO_CONGESTION is not None:
        with suppress(OSError):  # not every kernel has it, nor lets everybody choose it
            if sock.getsockopt(socket.IPPROTO_TCP, _SO_CONGESTION, 16).startswith(b"bbr"):
                sock.setsockopt(socket.IPPROTO_TCP, _SO_CONGESTION, _CONGESTION_CONTROL)
