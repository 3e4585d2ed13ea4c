"""The live page: what a browser loads, and the stream of samples that it draws.

The page itself is open; what it shows needs a user's token wherever calls do. It asks for one then.
"""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import FileResponse, JSONResponse, RedirectResponse, Response
from starlette.responses import StreamingResponse

from cluster.server.observe.live_state import LiveState

PAGE = Path(__file__).with_name("page")
FILES = {"live.js": "text/javascript", "live.css": "text/css"}
_HEADERS = {
    # Nothing from elsewhere, and nothing inline: what a request's id says cannot become a script.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
_SILENCE_S = 15.0


def live_routes(state: LiveState) -> APIRouter:
    """`/live` and what belongs to it."""
    routes = APIRouter(include_in_schema=False)

    @routes.get("/")
    def index() -> Response:
        return RedirectResponse("/live")

    @routes.get("/live")
    def page() -> Response:
        return FileResponse(PAGE / "index.html", media_type="text/html", headers=_HEADERS)

    @routes.get("/live/{name}")
    def part(name: str) -> Response:
        if name not in FILES:
            return JSONResponse({"error": {"message": f"no page {name!r:.100}"}}, 404)
        return FileResponse(PAGE / name, media_type=FILES[name], headers=_HEADERS)

    @routes.get("/live/data/state")
    async def everything() -> Response:
        return JSONResponse(state.everything(), headers={"Cache-Control": "no-store"})

    @routes.get("/live/data/samples")
    async def samples() -> Response:
        return StreamingResponse(_lines(state), media_type="application/x-ndjson")

    return routes


async def _lines(state: LiveState) -> AsyncIterator[str]:
    """One JSON object a line for every sample, for as long as the browser reads."""
    while True:
        try:
            async with asyncio.timeout(_SILENCE_S):
                sample = await state.next_sample()
        except TimeoutError:
            yield "\n"  # so that a reader that left is noticed
            continue
        yield json.dumps({"sample": sample, "now": state.now()}) + "\n"
