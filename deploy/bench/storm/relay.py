"""A TCP relay on loopback whose connections can be torn down at once, as when a client's host dies."""

import asyncio
import contextlib
import socket
import struct
from typing import Self

_RESET = struct.pack("ii", 1, 0)  # linger on, for no time: closing sends RST
_CHUNK = 1 << 16


class Relay:
    """Forwards to `host`:`port` until `tear` or the end of the `async with` block.

    Plain sockets, each closed by the one who holds it: streams accepted at the moment of the end
    would be left to the garbage collector, for a task cancelled before its first step closes nothing.
    """

    def __init__(self, host: str, port: int) -> None:
        self._target = host, port
        self._listener: socket.socket | None = None
        self._links: dict[socket.socket, asyncio.Task[None]] = {}

    async def __aenter__(self) -> Self:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.setblocking(False)
        asyncio.get_running_loop().add_reader(self._listener, self._accept, self._listener)
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._listener is not None
        asyncio.get_running_loop().remove_reader(self._listener)
        self._listener.close()
        await self.tear()

    @property
    def address(self) -> str:
        assert self._listener is not None
        port: int = self._listener.getsockname()[1]
        return f"127.0.0.1:{port}"

    async def tear(self) -> None:
        """Reset every connection on both sides."""
        links, self._links = self._links, {}
        for link in links.values():
            link.cancel()
        await asyncio.gather(*links.values(), return_exceptions=True)
        for near in links:
            _reset(near)

    def _accept(self, listener: socket.socket) -> None:
        try:
            near, _ = listener.accept()
        except OSError:  # left again before we came to it
            return
        near.setblocking(False)
        self._links[near] = asyncio.create_task(self._forward(near))

    async def _forward(self, near: socket.socket) -> None:
        far = socket.socket()
        far.setblocking(False)
        try:
            await asyncio.get_running_loop().sock_connect(far, self._target)
            async with asyncio.TaskGroup() as both:
                both.create_task(_copy(near, far))
                both.create_task(_copy(far, near))
        except (OSError, ExceptionGroup):
            pass  # the other side went first
        finally:
            _reset(far)
        self._links.pop(near, None)
        _reset(near)


async def _copy(source: socket.socket, sink: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    while data := await loop.sock_recv(source, _CHUNK):
        await loop.sock_sendall(sink, data)


def _reset(end: socket.socket) -> None:
    with contextlib.suppress(OSError):  # closed before
        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    end.close()
