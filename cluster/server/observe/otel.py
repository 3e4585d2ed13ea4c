"""Requests as OpenTelemetry spans (extra: otel), sent over OTLP from a thread of its own.

    chat MODEL | text_completion MODEL   from arrival to the end; a child of the caller's span, if any
        queue, prefill, decode           what its time went to

Attributes are those of the semantic conventions for generative AI:
https://opentelemetry.io/docs/specs/semconv/gen-ai/gen-ai-spans/
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from cluster.config import ConfigError
from cluster.server.in_flight import InFlight
from cluster.server.observe.observer import Observer
from cluster.server.observe.trace_context import parse_traceparent
from cluster.server.request import FinishReason, ModelInfo

if TYPE_CHECKING:
    from opentelemetry.trace import Tracer

SERVICE_NAME = "expertmesh"
EXPORT_TIMEOUT_S = 5


class RequestSpans(Observer):
    """A span for each request that ends, and for each phase that it came to."""

    def __init__(self, endpoint: str, model: ModelInfo) -> None:
        """`endpoint`: http://HOST:PORT, or https:// for TLS. Raises ConfigError without the extra."""
        self._model = model.name
        self._provider = _provider(endpoint)
        self._tracer: Tracer = self._provider.get_tracer("expertmesh")

    def ended(self, request: InFlight, outcome: str) -> None:
        from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context

        # The gateway's times are of time.monotonic, spans want the wall clock.
        now_ns = time.time_ns()
        offset_ns = now_ns - time.monotonic_ns()
        attributes = self._attributes(request, outcome)
        span = self._tracer.start_span(
            f"{attributes['gen_ai.operation.name']} {self._model}",
            context=_parent(request.traceparent),
            kind=SpanKind.SERVER,
            attributes=attributes,
            start_time=round(request.arrived * 1e9) + offset_ns,
        )
        if outcome not in list(FinishReason):
            span.set_status(Status(StatusCode.ERROR, outcome))
        inside = set_span_in_context(span)
        for name, start, end in phases(request):
            phase = self._tracer.start_span(
                name, context=inside, start_time=round(start * 1e9) + offset_ns
            )
            phase.end(round(end * 1e9) + offset_ns)
        span.end(now_ns)

    def close(self) -> None:
        """Send what is left, for a few seconds at most."""
        self._provider.shutdown()

    def _attributes(self, request: InFlight, outcome: str) -> dict[str, Any]:
        params = request.params
        attributes: dict[str, Any] = {
            "gen_ai.operation.name": "text_completion" if request.info.text is None else "chat",
            "gen_ai.provider.name": "expertmesh",
            "gen_ai.request.model": self._model,
            "gen_ai.response.model": self._model,
            "gen_ai.response.id": request.info.request_id,
            "gen_ai.request.max_tokens": request.info.max_tokens,
            "gen_ai.request.temperature": params.temperature,
            "gen_ai.request.top_p": params.top_p,
            "gen_ai.request.top_k": params.top_k,
            "gen_ai.request.seed": str(request.info.seed),
            "gen_ai.usage.input_tokens": request.info.num_tokens,
            "gen_ai.usage.output_tokens": request.num_completion_tokens,
            "gen_ai.usage.cache_read.input_tokens": request.cached_tokens,
            "expertmesh.replica": request.info.replica,
        }
        if request.num_choices > 1:
            attributes["gen_ai.request.choice.count"] = request.num_choices
        if request.first_token_at is not None:
            waited_s = request.first_token_at - request.arrived
            attributes["gen_ai.response.time_to_first_chunk"] = waited_s
        if outcome in list(FinishReason):
            attributes["gen_ai.response.finish_reasons"] = [outcome]
        else:
            attributes["error.type"] = outcome
        return attributes


def phases(request: InFlight) -> list[tuple[str, float, float]]:
    """(name, start, end) in `time.monotonic()` seconds of the phases that the request came to."""
    first, last = request.first_token_at, request.last_token_at
    if first is None or last is None:
        return []
    begun = min(first, request.arrived + (request.queue_ms or 0.0) / 1e3)
    return [
        ("queue", request.arrived, begun),
        ("prefill", begun, first),
        ("decode", first, last),
    ]


def _parent(traceparent: str | None) -> Any:
    """The context of the caller's span; an empty one makes the request's span a root."""
    from opentelemetry.context import Context
    from opentelemetry.trace import (
        NonRecordingSpan,
        SpanContext,
        TraceFlags,
        set_span_in_context,
    )

    caller = parse_traceparent(traceparent)
    if caller is None:
        return Context()
    flags = TraceFlags(TraceFlags.SAMPLED if caller.sampled else TraceFlags.DEFAULT)
    remote = SpanContext(int(caller.trace_id, 16), int(caller.span_id, 16), True, flags)
    return set_span_in_context(NonRecordingSpan(remote), Context())


def _provider(endpoint: str) -> Any:
    try:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise ConfigError(
            f"observability.otlp_traces_endpoint = {endpoint!r} needs OpenTelemetry ({error}): "
            "pip install 'expertmesh[otel]'"
        ) from None
    provider = TracerProvider(
        resource=Resource.create({"service.name": SERVICE_NAME}), shutdown_on_exit=False
    )
    exporter = OTLPSpanExporter(
        endpoint=endpoint, insecure=not endpoint.startswith("https://"), timeout=EXPORT_TIMEOUT_S
    )
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return provider
