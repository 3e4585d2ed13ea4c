"""The standard health service: "" is this process, a service's full name is readiness to serve."""

from collections.abc import AsyncIterator, Collection
from typing import Any

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cluster.server.readiness import Readiness

SERVICE_NAME: str = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name

_Status = health_pb2.HealthCheckResponse
# Types of the health package's messages are not published.
_Context = grpc.aio.ServicerContext[Any, Any]


class HealthServicer(health_pb2_grpc.HealthServicer):  # type: ignore[misc]
    """Answers from one Readiness; `Watch` pushes every change until the client leaves.

    A slow watcher holds up nobody: it skips to the newest state when it reads again.
    """

    def __init__(self, readiness: Readiness, services: Collection[str]) -> None:
        self._readiness = readiness
        self._services = frozenset(services)

    async def Check(self, request: Any, context: _Context) -> Any:
        if request.service and request.service not in self._services:
            await context.abort(
                grpc.StatusCode.NOT_FOUND,
                f"unknown service {request.service!r:.200}; known: '' and {sorted(self._services)}",
            )
        return _Status(status=self._status(request.service))

    async def Watch(self, request: Any, context: _Context) -> AsyncIterator[Any]:
        while True:
            ready = self._readiness.ready
            yield _Status(status=self._status(request.service))
            # The process answers as long as it lives, and an unknown service stays unknown.
            while self._readiness.ready == ready or request.service not in self._services:
                await self._readiness.change()

    async def List(self, request: Any, context: _Context) -> Any:
        statuses = {
            name: _Status(status=self._status(name)) for name in ("", *sorted(self._services))
        }
        return health_pb2.HealthListResponse(statuses=statuses)

    def _status(self, service: str) -> int:
        if service == "":
            return int(_Status.SERVING)
        if service not in self._services:
            return int(_Status.SERVICE_UNKNOWN)
        return int(_Status.SERVING if self._readiness.ready else _Status.NOT_SERVING)
