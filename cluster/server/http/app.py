"""The HTTP application: all routes over one gateway."""

from typing import Any

from fastapi import FastAPI

from cluster.server.gateway import Gateway
from cluster.server.http.chat_completions import chat_routes
from cluster.server.http.completions import completion_routes
from cluster.server.http.door import Door
from cluster.server.http.errors import respond_with_errors
from cluster.server.http.info import info_routes, open_routes, token_routes
from cluster.server.http.live import FILES, live_routes
from cluster.server.observe.live_state import LiveState
from cluster.server.observe.metrics import Metrics
from cluster.server.security import Credentials
from cluster.server.tokenizer import TokenTexts

_OPEN = frozenset(
    {"/health", "/version", "/openapi.json", "/", "/live", *(f"/live/{name}" for name in FILES)}
)
"""For probes, generators of clients and browsers: none of these has a token, nor tells any secret."""


def make_app(
    gateway: Gateway, credentials: Credentials, metrics: Metrics | None, live: LiveState | None
) -> Any:
    """An ASGI application; runs in the gateway's event loop."""

    # No pages of documentation: theirs load scripts from other hosts.
    app = FastAPI(title="expertmesh", docs_url=None, redoc_url=None)
    respond_with_errors(app)
    texts = TokenTexts(gateway.tokenizer)
    app.include_router(open_routes(gateway))
    app.include_router(completion_routes(gateway, texts))
    app.include_router(chat_routes(gateway, texts))
    app.include_router(info_routes(gateway, metrics))
    app.include_router(token_routes(gateway))
    if live:
        app.include_router(live_routes(live))
    return Door(app, credentials, _OPEN, gateway.config.server.max_message_mib << 20)
