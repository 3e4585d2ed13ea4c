"""The HTTP server: an OpenAI-compatible API, metrics and the live page on one port."""

import asyncio
import socket
from typing import TYPE_CHECKING, Any

from cluster.config import ConfigError, ServeConfig
from cluster.server.gateway import Gateway
from cluster.server.observe.live_state import LiveState
from cluster.server.observe.metrics import Metrics
from cluster.server.security import Credentials

if TYPE_CHECKING:
    import uvicorn

_START_TIMEOUT_S = 10.0
_BACKLOG = 2048
_HEADERS_TIMEOUT_S = 30.0
_UNREAD_TIMEOUT_S = 120.0
"""The kernel ends connections whose client takes nothing of what was sent for this long."""
_KEEP_ALIVE_S = 75
"""Longer than clients keep idle connections, so that it is they who close them."""


class HttpServer:
    """Serves from `start` to `stop`; runs in the gateway's event loop."""

    def __init__(
        self,
        gateway: Gateway,
        config: ServeConfig,
        credentials: Credentials,
        metrics: Metrics | None = None,
        live: LiveState | None = None,
    ) -> None:
        self._gateway = gateway
        self._config = config.server
        self._credentials = credentials
        self._metrics = metrics
        self._live = live
        self._server: uvicorn.Server | None = None
        self._serving: asyncio.Task[None] | None = None

    async def start(self) -> int:
        """Listen and return the bound port; raises ConfigError if that cannot be done."""
        try:
            import uvicorn

            from cluster.server.http.app import make_app
            from cluster.server.http.connections import QuietServer, connections_with_patience
        except ModuleNotFoundError as error:
            raise ConfigError(
                f"server.http_port needs {error.name}: pip install 'expertmesh[http]', or set it to "
                "null for gRPC only"
            ) from None
        app = make_app(self._gateway, self._credentials, self._metrics, self._live)
        listener = self._listen()
        connections = connections_with_patience(_HEADERS_TIMEOUT_S)
        config = uvicorn.Config(app, http=connections, **self._options())
        config.load()
        config.ssl = self._credentials.ssl_context  # its own would be read once and for all
        self._server = QuietServer(config)
        self._serving = asyncio.create_task(
            self._server.serve(sockets=[listener]), name="http-server"
        )
        async with asyncio.timeout(_START_TIMEOUT_S):
            while not self._server.started and not self._serving.done():
                await asyncio.sleep(0.005)
        if self._serving.done():
            await self._serving
        port: int = listener.getsockname()[1]
        return port

    @property
    def num_connections(self) -> int:
        return len(self._server.server_state.connections) if self._server else 0

    async def stop(self, grace_s: float = 1.0) -> None:
        """Take no more connections, give running requests `grace_s` seconds, then cancel them."""
        if self._server and self._serving:
            server, self._server = self._server, None
            server.config.timeout_graceful_shutdown = grace_s  # type: ignore[assignment]
            server.should_exit = True
            await self._serving

    def _listen(self) -> socket.socket:
        host, port = self._config.host, self._config.http_port or 0
        try:
            family, kind, _, _, address = socket.getaddrinfo(
                host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )[0]
            listener = socket.socket(family, kind)
            try:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if hasattr(socket, "TCP_USER_TIMEOUT"):  # connections inherit it
                    unread_ms = round(1e3 * _UNREAD_TIMEOUT_S)
                    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, unread_ms)
                listener.bind(address)
            except OSError:
                listener.close()
                raise
        except OSError as error:
            raise ConfigError(
                f"server.host, server.http_port: cannot listen on {host}:{port}: {error}"
            ) from None
        return listener

    def _options(self) -> dict[str, Any]:
        return {
            "lifespan": "off",
            "ws": "none",
            "access_log": False,
            "log_config": None,
            "log_level": "warning",
            "server_header": False,
            "proxy_headers": False,
            "backlog": _BACKLOG,
            "timeout_keep_alive": _KEEP_ALIVE_S,
            "limit_concurrency": self._config.max_concurrent_rpcs,
            "h11_max_incomplete_event_size": self._config.max_metadata_kib << 10,
        }
