"""Messages that are no protobuf are the client's fault, and are answered as such.

Left to itself the library takes them for a failure of ours: status UNKNOWN, and a traceback in the log.
"""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from cluster.server.errors import Code, RequestError
from cluster.server.rpc.status import abort_with

_Handler = Any  # of grpc.RpcMethodHandler, which takes its parameters in stubs only
_Context = grpc.aio.ServicerContext[Any, Any]


@dataclass(frozen=True)
class _Unreadable:
    """In place of the message."""

    reason: str

    async def refuse(self, context: _Context) -> None:
        await abort_with(
            context,
            RequestError(Code.INVALID_ARGUMENT, f"the message cannot be read: {self.reason}"),
        )


class RefuseUnreadable(grpc.aio.ServerInterceptor):
    """For calls with one request message, which all of ours are."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[_Handler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> _Handler:
        handler = await continuation(handler_call_details)
        if handler is None or handler.request_streaming or handler.request_deserializer is None:
            return handler
        read, write = _tolerant(handler.request_deserializer), handler.response_serializer
        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(_streamed(handler), read, write)
        return grpc.unary_unary_rpc_method_handler(_unary(handler), read, write)


def _tolerant(read: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    def read_if_possible(data: bytes) -> Any:
        try:
            return read(data)
        except DecodeError as error:
            return _Unreadable(str(error))

    return read_if_possible


def _unary(handler: _Handler) -> Callable[[Any, _Context], Awaitable[Any]]:
    async def answer(request: Any, context: _Context) -> Any:
        if isinstance(request, _Unreadable):
            await request.refuse(context)
        return await handler.unary_unary(request, context)

    return answer


def _streamed(handler: _Handler) -> Callable[[Any, _Context], AsyncIterator[Any]]:
    async def answer(request: Any, context: _Context) -> AsyncIterator[Any]:
        if isinstance(request, _Unreadable):
            await request.refuse(context)
        async with aclosing(handler.unary_stream(request, context)) as messages:
            async for message in messages:
                yield message

    return answer
