"""Who looks at the gateway: the observers that the configuration asks for."""

from __future__ import annotations

import asyncio

from cluster.config import ServeConfig
from cluster.rebalancer import Rebalancer
from cluster.server.gateway import Gateway
from cluster.server.observe.live_state import LiveState
from cluster.server.observe.metrics import Metrics
from cluster.server.observe.observer import Observer, Observers
from cluster.server.observe.otel import RequestSpans
from cluster.server.observe.request_log import RequestLog
from cluster.server.request import ModelInfo


class Observability:
    """`observer` is for the gateway, `metrics` and `live` for the HTTP server; `close` at the end.

    Raises ConfigError where the configuration asks for a library that is missing.
    """

    def __init__(self, config: ServeConfig, model_info: ModelInfo) -> None:
        options = config.observability
        self.metrics = Metrics(config, model_info)
        observers: list[Observer] = [self.metrics]
        self.live = LiveState(config) if config.server.http_port is not None else None
        """What the live page shows; None where there is no HTTP."""
        if self.live:
            observers.append(self.live)
        if options.log_requests:
            observers.append(RequestLog())
        self._spans: RequestSpans | None = None
        if options.otlp_traces_endpoint is not None:
            self._spans = RequestSpans(options.otlp_traces_endpoint, model_info)
            observers.append(self._spans)
        self.observer: Observer = Observers(observers)

    def watch(self, gateway: Gateway, rebalancer: Rebalancer | None) -> None:
        """Where to look for what observers are not told."""
        self.metrics.watch(gateway, rebalancer)
        if self.live:
            self.live.start(gateway, rebalancer)

    async def close(self) -> None:
        """Send the spans that are left; a collector that does not answer is waited for briefly."""
        if self.live:
            await self.live.stop()
        if self._spans:
            spans, self._spans = self._spans, None
            await asyncio.to_thread(spans.close)
