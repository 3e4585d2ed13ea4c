"""A TCP relay on loopback whose connections can be torn down at once, as when a client's host dies."""

import asyncio
import contextlib
import socket
import struct
from typing import Self

_RESET = struct.pack("ii", 1, 0)  # linger on, for no time: closing sends RST
_CHUNK = 1 << 16


class Relay:
    """Forwards to `host`:`port` until `tear` or the end of the `async with` block."""

    def __init__(self, host: str, port: int) -> None:
        self._target = host, port
        self._pairs: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self._closed = False

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        self._closed = True
        await self.tear()

    @property
    def address(self) -> str:
        assert self._server is not None
        port: int = self._server.sockets[0].getsockname()[1]
        return f"127.0.0.1:{port}"

    async def tear(self) -> None:
        """Reset every connection on both sides."""
        pairs = list(self._pairs)
        for pair in pairs:
            pair.cancel()
        await asyncio.gather(*pairs, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._closed:
            _reset(writer)
            return
        task = asyncio.current_task()
        assert task is not None
        self._pairs.add(task)
        there: asyncio.StreamWriter | None = None
        try:
            back, there = await asyncio.open_connection(*self._target)
            async with asyncio.TaskGroup() as both:
                both.create_task(_copy(reader, there))
                both.create_task(_copy(back, writer))
        except (OSError, ExceptionGroup, asyncio.CancelledError):
            pass  # torn down, or the other side went first: what we are for
        finally:
            self._pairs.discard(task)
            for end in (writer, there):
                if end is not None:
                    _reset(end)


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(_CHUNK):
        writer.write(data)
        await writer.drain()


def _reset(writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError, AttributeError):
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    writer.transport.abort()
