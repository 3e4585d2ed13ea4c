"""What clients do to a server in a storm. Each kind of trouble is one request, and says how it ended.

Outcomes are names of gRPC codes as the client saw them, or what the client did itself.
"""

import asyncio
import json
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio

from cluster.server.proto.expertmesh.v1 import inference_pb2 as pb
from cluster.server.proto.expertmesh.v1 import inference_pb2_grpc as pb_grpc
from deploy.bench.storm.messages import garbage, malformed_request, valid_request
from deploy.bench.storm.relay import Relay

PATIENCE_S = 120.0
OUR_FAULT = {"INTERNAL", "UNKNOWN", "DATA_LOSS", "UNAVAILABLE", "UNIMPLEMENTED"}
"""Codes that no request here deserves."""
_GENERATE_STREAM = f"/{pb.DESCRIPTOR.services_by_name['Inference'].full_name}/GenerateStream"
_ENOUGH = 30
"""Chunks that are read of a stream that goes well."""
_OPTIONS = [("grpc.use_local_subchannel_pool", 1)]


@dataclass(frozen=True)
class Target:
    """Where the storm goes. http: (host, port) of the HTTP front end, if there is one."""

    endpoint: str
    http: tuple[str, int] | None
    vocab_size: int

    @property
    def address(self) -> tuple[str, int]:
        host, _, port = self.endpoint.rpartition(":")
        return host.strip("[]"), int(port)


class Client:
    """One of many that share nothing but the target; its channel is made anew after a disconnect."""

    def __init__(self, target: Target, chance: random.Random) -> None:
        self._target = target
        self._chance = chance
        self._channel = grpc.aio.insecure_channel(target.endpoint, options=_OPTIONS)
        self._stub: Any = pb_grpc.InferenceStub(self._channel)

    async def close(self) -> None:
        await self._channel.close()

    async def once(self) -> tuple[str, str]:
        """Some trouble: its kind, and how it ended."""
        kinds = [kind for kind in KINDS if self._target.http or not kind.http]
        kind = self._chance.choices(kinds, [kind.weight for kind in kinds])[0]
        async with asyncio.timeout(2 * PATIENCE_S):  # calls have their own limit, and tell of it
            return kind.name, await kind.act(self)

    async def leave_stream(self) -> str:
        call = self._stub.GenerateStream(self._valid(), timeout=PATIENCE_S)
        try:
            for _ in range(self._chance.randint(0, 6)):
                if await call.read() is grpc.aio.EOF:
                    return "ended before"
            if self._chance.random() < 0.3:
                await asyncio.sleep(self._chance.random() * 0.05)
        except grpc.aio.AioRpcError as error:
            return error.code().name
        finally:
            call.cancel()
        return "left"

    async def cancel_unary(self) -> str:
        call = self._stub.Generate(self._valid(), timeout=PATIENCE_S)
        await asyncio.sleep(self._chance.random() * 0.05)
        call.cancel()
        return await _code(call)

    async def run_out_of_time(self) -> str:
        limit_s = 10 ** self._chance.uniform(-4, -1)
        return await _code(self._stub.Generate(self._valid(), timeout=limit_s))

    async def disconnect(self) -> str:
        """The connection is reset while streams are open; one of a few requests on it."""
        async with (
            Relay(*self._target.address) as relay,
            grpc.aio.insecure_channel(relay.address, options=_OPTIONS) as channel,
        ):
            stub: Any = pb_grpc.InferenceStub(channel)
            calls = [stub.GenerateStream(self._valid()) for _ in range(self._chance.randint(1, 3))]
            with suppress(grpc.aio.AioRpcError, TimeoutError):
                async with asyncio.timeout(self._chance.random() * 0.3):
                    await calls[0].read()
                    await calls[0].read()
            await relay.tear()
            for call in calls:
                call.cancel()
        return "reset"

    async def send_malformed(self) -> str:
        request = malformed_request(self._chance, self._target.vocab_size)
        return await _beginning(self._stub.GenerateStream(request, timeout=PATIENCE_S))

    async def send_garbage(self) -> str:
        data = garbage(self._chance, self._target.vocab_size)
        call: Any = self._channel.unary_stream(_GENERATE_STREAM)
        return await _beginning(call(data, timeout=PATIENCE_S))

    async def complete(self) -> str:
        return await _code(self._stub.Generate(self._valid(), timeout=PATIENCE_S))

    async def send_bytes(self) -> str:
        """To the gRPC port, what is no HTTP/2, or begins as if it were."""
        greeting = self._chance.choice(
            (b"", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"GET / HTTP/1.1\r\n")
        )
        async with _connected(*self._target.address) as (_, writer):
            writer.write(greeting + self._chance.randbytes(self._chance.randint(0, 2000)))
            with suppress(OSError):
                await writer.drain()
        return "reset"

    async def send_http(self) -> str:
        """A body that is no JSON, or JSON that is no request; read to its end."""
        body = self._http_body()
        assert self._target.http is not None
        async with _connected(*self._target.http) as (reader, writer):
            writer.write(_http_request(body))
            return (await reader.readline()).decode("latin-1").strip()[9:12] or "closed"

    async def leave_http(self) -> str:
        """A stream is reset after some of it was read, or while the body is still being sent."""
        body = json.dumps(
            {"model": "mosaic", "prompt": "Once upon", "max_tokens": 48, "stream": True}
        ).encode()
        assert self._target.http is not None
        async with _connected(*self._target.http) as (reader, writer):
            request = _http_request(body)
            if self._chance.random() < 0.3:
                request = request[: self._chance.randrange(len(request))]
            writer.write(request)
            with suppress(TimeoutError):
                async with asyncio.timeout(self._chance.random() * 0.2):
                    await reader.read(self._chance.randint(1, 2000))
        return "reset"

    def _valid(self) -> pb.GenerateRequest:
        return valid_request(self._chance, self._target.vocab_size)

    def _http_body(self) -> bytes:
        chance = self._chance
        odd: tuple[Any, ...] = (None, True, -1, 1e999, "x", [], {}, [[1]], {"a": []}, 10**30)
        fields = ("model", "prompt", "max_tokens", "temperature", "stop", "n", "logprobs", "seed")
        body: dict[str, Any] = {"model": "mosaic", "prompt": "a", "max_tokens": 2}
        for name in chance.choices(fields, k=2):
            body[name] = chance.choice(odd)
        text = json.dumps(body).encode()
        return text if chance.random() < 0.7 else text[: chance.randrange(len(text))]


@dataclass(frozen=True)
class Kind:
    name: str
    act: Callable[[Client], Awaitable[str]]
    weight: int
    http: bool = False


KINDS = (
    Kind("stream left", Client.leave_stream, 30),
    Kind("unary cancelled", Client.cancel_unary, 10),
    Kind("deadline", Client.run_out_of_time, 8),
    Kind("connection reset", Client.disconnect, 8),
    Kind("malformed", Client.send_malformed, 24),
    Kind("garbage message", Client.send_garbage, 8),
    Kind("garbage bytes", Client.send_bytes, 2),
    Kind("completed", Client.complete, 2),
    Kind("HTTP malformed", Client.send_http, 4, http=True),
    Kind("HTTP reset", Client.leave_http, 4, http=True),
)


async def _beginning(call: Any) -> str:
    """How a stream ended, or that it went well so far: some ask for all that the model can hold."""
    try:
        for _ in range(_ENOUGH):
            if await call.read() is grpc.aio.EOF:
                return "OK"
    except grpc.aio.AioRpcError as error:
        return _name(error)
    finally:
        call.cancel()
    return "OK so far"


async def _code(call: Any) -> str:
    """How a unary call ended."""
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return _name(error)
    except asyncio.CancelledError:
        return "CANCELLED"
    return "OK"


def _name(error: grpc.aio.AioRpcError) -> str:
    code = str(error.code().name)
    return f"{code}: {error.details():.150}" if code in OUR_FAULT else code


def _http_request(body: bytes) -> bytes:
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: storm\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + body


@asynccontextmanager
async def _connected(
    host: str, port: int
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection(host, port)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()
