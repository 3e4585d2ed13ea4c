"""One line in the log for each request that ends: never its text."""

import logging

from cluster.server.in_flight import InFlight
from cluster.server.observe.observer import Observer
from cluster.server.observe.trace_context import trace_id_of

logger = logging.getLogger(__name__)


class RequestLog(Observer):
    """Counts and times of each request, as words and, in JSON lines, as fields; times are in ms."""

    def ended(self, request: InFlight, outcome: str) -> None:
        facts: dict[str, object] = {
            "request_id": request.info.request_id,
            "outcome": outcome,
            "replica": request.info.replica,
            "prompt_tokens": request.info.num_tokens,
            "cached_tokens": request.cached_tokens,
            "completion_tokens": request.num_completion_tokens,
            "choices": request.num_choices,
            "queue_ms": _rounded(request.queue_ms),
            "first_token_ms": _since(request.arrived, request.first_token_at),
            "last_token_ms": _since(request.arrived, request.last_token_at),
        }
        if trace_id := trace_id_of(request.traceparent):
            facts["trace_id"] = trace_id
        logger.info(
            "request %s: %s, %d + %d tokens (%d cached), first after %s ms, last after %s ms",
            request.info.request_id,
            outcome,
            request.info.num_tokens,
            request.num_completion_tokens,
            request.cached_tokens,
            facts["first_token_ms"],
            facts["last_token_ms"],
            extra=facts,
        )


def _since(start: float, end: float | None) -> float | None:
    return None if end is None else _rounded(1e3 * (end - start))


def _rounded(ms: float | None) -> float | None:
    return None if ms is None else round(ms, 3)
