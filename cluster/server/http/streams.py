"""Answers over HTTP that end when their reader leaves, and server-sent events."""

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from cluster.server.errors import RequestError
from cluster.server.http.answer import Answer
from cluster.server.http.errors import INTERNAL, ReaderLeftError, body_of

_T = TypeVar("_T")
_DONE = b"data: [DONE]\n\n"
_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode

logger = logging.getLogger(__name__)


async def unless_reader_leaves(receive: Receive, work: Coroutine[Any, Any, _T]) -> _T:
    """The work's result; cancels it and raises ReaderLeftError when the client disconnects.

    The request's body must have been read.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ReaderLeftError
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


class EventStream(Response):
    """Server-sent events of JSON objects, at last `[DONE]`; an error becomes the last object.

    A reader that is slow holds up `objects`. `answer` is closed whatever happens, also when the reader
    has left before the first object.
    """

    media_type = "text/event-stream"

    def __init__(self, objects: AsyncGenerator[Any, None], answer: Answer) -> None:
        self._objects = objects
        self._answer = answer
        self.status_code = 200
        self.background = None
        # Proxies must neither keep events back nor keep them for others.
        self.init_headers({"Cache-Control": "no-store", "X-Accel-Buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._answer):
            with contextlib.suppress(ReaderLeftError):
                await unless_reader_leaves(receive, self._send(send))

    async def _send(self, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)
        async with aclosing(self._objects) as objects:
            async for event in _events(objects):
                await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": _DONE, "more_body": False})


async def _events(objects: AsyncIterator[Any]) -> AsyncIterator[bytes]:
    try:
        async for item in objects:
            yield b"data: " + _encode(item).encode() + b"\n\n"
    except RequestError as error:
        yield b"data: " + _encode(body_of(error)).encode() + b"\n\n"
    except Exception:
        logger.exception("a stream failed for a reason that is our own")
        yield b"data: " + _encode(body_of(INTERNAL)).encode() + b"\n\n"


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
