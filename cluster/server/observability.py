"""Who looks at the gateway: the observers that the configuration asks for."""

from __future__ import annotations

import asyncio

from cluster.config import ServeConfig
from cluster.server.metrics import Metrics
from cluster.server.observer import Observer, Observers
from cluster.server.otel import RequestSpans
from cluster.server.request import ModelInfo
from cluster.server.request_log import RequestLog


class Observability:
    """`observer` is for the gateway, `metrics` for whoever shows them; `close` at the end.

    Raises ConfigError where the configuration asks for a library that is missing.
    """

    def __init__(self, config: ServeConfig, model_info: ModelInfo) -> None:
        options = config.observability
        self.metrics = Metrics(config, model_info)
        observers: list[Observer] = [self.metrics]
        if options.log_requests:
            observers.append(RequestLog())
        self._spans: RequestSpans | None = None
        if options.otlp_traces_endpoint is not None:
            self._spans = RequestSpans(options.otlp_traces_endpoint, model_info)
            observers.append(self._spans)
        self.observer: Observer = Observers(observers)

    async def close(self) -> None:
        """Send the spans that are left; a collector that does not answer is waited for briefly."""
        if self._spans:
            spans, self._spans = self._spans, None
            await asyncio.to_thread(spans.close)
