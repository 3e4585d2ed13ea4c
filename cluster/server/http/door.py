"""What every HTTP request passes on its way in: an id, a clock, a look at its token, and limits of its body."""

import asyncio
import time
import uuid
from collections.abc import Collection

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.server.errors import RequestError
from cluster.server.http.errors import response_of
from cluster.server.security import Credentials

_BODY_TIMEOUT_S = 60.0
_PATIENCE = 8
"""How many times the largest body is read, and forgotten, of one that is too large."""


class Door:
    """ASGI middleware; the request's id is in `scope["state"]["request_id"]` and in the answer, and
    `scope["state"]["arrived"]` is when its headers had come (`time.monotonic()`).

    Paths that are not among `open_paths` need a user's token, if the server has any.
    """

    def __init__(
        self,
        app: ASGIApp,
        credentials: Credentials,
        open_paths: Collection[str],
        max_body_bytes: int,
    ) -> None:
        self._app = app
        self._credentials = credentials
        self._open_paths = open_paths
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        request_id = headers.get(b"x-request-id", b"").decode("latin-1") or uuid.uuid4().hex
        scope.setdefault("state", {}).update(request_id=request_id, arrived=time.monotonic())
        header = (b"x-request-id", request_id.encode("latin-1"))

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), header]
            await send(message)

        try:
            if scope["path"] not in self._open_paths:
                self._credentials.check_user(headers.get(b"authorization"))
        except RequestError as error:  # before anything of the body is read
            await response_of(error)(scope, receive, send_with_id)
            return
        await self._app(scope, _Limited(receive, self._max_body_bytes), send_with_id)


class _Limited:
    """`receive` that refuses a body which is too large, or too slow to be honest."""

    def __init__(self, receive: Receive, max_bytes: int) -> None:
        self._receive = receive
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._complete = False

    async def __call__(self) -> Message:
        if self._complete:
            return await self._receive()
        try:
            async with asyncio.timeout(_BODY_TIMEOUT_S):
                message = await self._next()
                while self._num_bytes > self._max_bytes and not self._complete:
                    await self._next()  # who still sends does not read our refusal
        except TimeoutError:
            raise HTTPException(408, "the body did not come") from None
        if self._num_bytes > self._max_bytes:
            raise HTTPException(
                413, f"the body is larger than server.max_message_mib = {self._max_bytes >> 20}"
            )
        return message

    async def _next(self) -> Message:
        message = await self._receive()
        self._num_bytes += len(message.get("body", b""))
        enough = self._num_bytes > _PATIENCE * self._max_bytes
        self._complete = enough or not message.get("more_body", False)
        return message
