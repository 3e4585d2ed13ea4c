"""The storm's relay forwards, resets, and leaves no connection to the garbage collector."""

import asyncio
import contextlib
import gc
import socket
import sys

import pytest

from deploy.bench.storm.relay import Relay

PATIENCE_S = 20


def _connected(relay):
    host, port = relay.address.split(":")
    return socket.create_connection((host, int(port)), timeout=PATIENCE_S)


def _assert_reset(link):
    with pytest.raises(ConnectionResetError):
        link.recv(1)


def test_every_byte_comes_back_and_tearing_resets():
    said = bytes(range(256)) * 4096

    async def echo(reader, writer):
        with contextlib.suppress(ConnectionResetError):
            while data := await reader.read(1 << 16):
                writer.write(data)

    async def say(link):
        saying = asyncio.create_task(asyncio.to_thread(link.sendall, said))
        heard = b""
        while len(heard) < len(said):
            heard += await asyncio.to_thread(link.recv, 1 << 16)
        await saying
        return heard

    async def talk():
        server = await asyncio.start_server(echo, "127.0.0.1", 0)
        async with server, Relay(*server.sockets[0].getsockname()) as relay:
            for _ in range(2):  # one that was torn serves whoever comes next
                with await asyncio.to_thread(_connected, relay) as link:
                    assert await say(link) == said
                    await relay.tear()
                    await asyncio.to_thread(_assert_reset, link)

    asyncio.run(talk())


def test_a_server_that_is_gone_resets_its_clients():
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        gone = nobody.getsockname()

    def hear(relay):
        with _connected(relay) as link:
            link.recv(1)

    async def come():
        async with Relay(*gone) as relay:
            with pytest.raises(ConnectionResetError):  # at once, or only when it listens
                await asyncio.to_thread(hear, relay)

    asyncio.run(come())


@pytest.mark.parametrize("steps", range(8))
def test_connections_accepted_at_the_end_are_closed(steps, monkeypatch):
    """Whatever step of being accepted the end of the block meets."""

    async def leave():
        with socket.create_server(("127.0.0.1", 0)) as behind:
            async with Relay(*behind.getsockname()) as relay:
                links = [_connected(relay) for _ in range(4)]
                for _ in range(steps):
                    await asyncio.sleep(0)
        return links

    found = []
    monkeypatch.setattr(sys, "unraisablehook", lambda left: found.append(str(left.exc_value)))
    links = asyncio.run(leave())
    gc.collect()
    assert found == []
    for link in links:
        with link:
            _assert_reset(link)
