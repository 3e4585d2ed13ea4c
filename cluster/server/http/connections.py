"""uvicorn for a server among others in one event loop, which does not wait for ever for its clients."""

import asyncio
import contextlib
from collections.abc import Iterator

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol


class QuietServer(uvicorn.Server):
    """Without signal handlers: signals belong to whoever runs the event loop."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def connections_with_patience(patience_s: float) -> type[H11Protocol]:
    """Connections that are closed when a request's headers have not come after `patience_s`.

    uvicorn has a limit between requests only: thousands of clients that begin none, or send a header
    for hours, would take the place of all others.
    """

    class Connection(H11Protocol):
        _patience: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._look()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._look()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_waiting()
            super().connection_lost(exc)

        def _look(self) -> None:
            """Wait for a request, or no longer if there is one."""
            if self.cycle and not self.cycle.response_complete:
                self._stop_waiting()
            elif self._patience is None:
                self._patience = self.loop.call_later(patience_s, self.transport.close)

        def _stop_waiting(self) -> None:
            if self._patience:
                self._patience.cancel()
                self._patience = None

    return Connection
