"""Tokens at the door of the gRPC server: calls without one are refused before their message is read."""

from collections.abc import Awaitable, Callable, Collection
from typing import Any
from urllib.parse import unquote

import grpc
import grpc.aio

from cluster.server.errors import RequestError
from cluster.server.rpc.status import abort_with
from cluster.server.security import Credentials, is_loopback

_Handler = Any  # of grpc.RpcMethodHandler, which takes its parameters in stubs only


class TokenCheck(grpc.aio.ServerInterceptor):
    """Asks for a user's token in every call but those of the `open_services` (full names)."""

    def __init__(self, credentials: Credentials, open_services: Collection[str]) -> None:
        self._credentials = credentials
        self._open = frozenset(open_services)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[_Handler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> _Handler:
        service = handler_call_details.method.strip("/").partition("/")[0]
        if service not in self._open:
            try:
                self._credentials.check_user(authorization(handler_call_details))
            except RequestError as error:
                return _refusal(error)
        return await continuation(handler_call_details)


def authorization(call: Any) -> str | bytes | None:
    """What a call (its details or its context) brought as `authorization`."""
    metadata = call.invocation_metadata
    sent = dict((metadata() if callable(metadata) else metadata) or ())
    value: str | bytes | None = sent.get("authorization")
    return value


def peer_is_loopback(peer: str) -> bool:
    """`peer` as gRPC writes it, e.g. "ipv4:127.0.0.1:4711" or "ipv6:%5B::1%5D:4711"."""
    kind, _, address = unquote(peer).partition(":")
    return kind == "unix" or is_loopback(address.rpartition(":")[0])


def _refusal(error: RequestError) -> _Handler:
    """For calls of any kind: it sends a status and no message."""

    async def refuse(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        await abort_with(context, error)

    return grpc.unary_unary_rpc_method_handler(refuse)
