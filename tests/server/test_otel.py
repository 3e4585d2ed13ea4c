"""Spans of requests as a real collector receives them."""

import sys
import time

import pytest

from cluster.config import ConfigError
from cluster.server.errors import RequestError
from cluster.server.observe.otel import RequestSpans
from cluster.server.observe.trace_context import parse_traceparent
from cluster.server.request import ModelInfo
from tests.server.collector import attributes, collecting, generate_in_trace
from tests.server.serving import serve

# The example of https://www.w3.org/TR/trace-context/#examples-of-http-traceparent-headers
TRACE, CALLER = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
TRACEPARENT = f"00-{TRACE}-{CALLER}-01"
MODEL = ModelInfo(name="tiny", vocab_size=10, max_model_len=10)


@pytest.fixture
def collector(monkeypatch):
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
    with collecting() as collector:
        yield collector


def traced(collector, *overrides, **options):
    endpoint = f"observability.otlp_traces_endpoint={collector.endpoint}"
    return serve(endpoint, *overrides, **options)


def test_a_request_is_a_span_in_its_callers_trace_with_its_phases_below(collector):
    with traced(collector, step_s=0.01) as serving:
        before_ns = time.time_ns()
        answer = generate_in_trace(
            serving, TRACEPARENT, max_tokens=6, ignore_eos=True, temperature=0.5, seed=(1 << 64) - 1
        )
        after_ns = time.time_ns()
        collector.wait_for(4)
    assert len(collector.spans) == 4
    spans = {span.name: span for span in collector.spans}
    request = spans["text_completion tiny"]
    assert request.trace_id.hex() == TRACE
    assert request.parent_span_id.hex() == CALLER
    told = attributes(request)
    assert told == {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "expertmesh",
        "gen_ai.request.model": "tiny",
        "gen_ai.response.model": "tiny",
        "gen_ai.response.id": answer.prompt.request_id,
        "gen_ai.response.finish_reasons": ["length"],
        "gen_ai.response.time_to_first_chunk": pytest.approx(answer.usage.ttft_ms / 1e3),
        "gen_ai.request.max_tokens": 6,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 1.0,
        "gen_ai.request.top_k": 0,
        "gen_ai.request.seed": str((1 << 64) - 1),
        "gen_ai.usage.input_tokens": 2,
        "gen_ai.usage.output_tokens": 6,
        "gen_ai.usage.cache_read.input_tokens": answer.usage.cached_tokens,
        "expertmesh.replica": 0,
    }
    phases = [spans["queue"], spans["prefill"], spans["decode"]]
    for phase in phases:
        assert phase.trace_id == request.trace_id
        assert phase.parent_span_id == request.span_id
    # One after the other from the request's beginning, and on the clock of the wall.
    edges = [request.start_time_unix_nano]
    for phase in phases:
        assert phase.start_time_unix_nano == edges[-1]
        edges.append(phase.end_time_unix_nano)
    assert edges == sorted(edges)
    assert before_ns - 2e6 < edges[0] < edges[-1] <= request.end_time_unix_nano < after_ns + 2e6
    first_s = (phases[2].start_time_unix_nano - edges[0]) / 1e9
    assert first_s == pytest.approx(answer.usage.ttft_ms / 1e3, abs=1e-5)
    assert {"service.name": "expertmesh"}.items() <= collector.resources[0].items()


@pytest.mark.parametrize("traceparent", ["", "00-xyz", f"00-{'0' * 32}-{CALLER}-01"])
def test_a_request_outside_of_a_trace_begins_one(collector, traceparent):
    with traced(collector) as serving:
        generate_in_trace(serving, traceparent, max_tokens=1)
        collector.wait_for(4)
    roots = [span for span in collector.spans if not span.parent_span_id]
    assert [root.name for root in roots] == ["text_completion tiny"]
    assert len({span.trace_id for span in collector.spans}) == 1


def test_callers_that_do_not_sample_are_not_traced(collector):
    with traced(collector) as serving:
        generate_in_trace(serving, f"00-{TRACE}-{CALLER}-00", max_tokens=1)
        generate_in_trace(serving, f"00-{'1' * 32}-{CALLER}-01", max_tokens=1)
        collector.wait_for(4)
    assert {span.trace_id.hex() for span in collector.spans} == {"1" * 32}


def test_a_failed_request_is_an_error_without_phases(collector):
    with traced(collector) as serving:
        serving.leaders[0].fail_prompts_with = 7
        with pytest.raises(RequestError):
            serving.client.generate([7, 8])
        (span,) = collector.wait_for(1)
    assert span.status.code == span.status.STATUS_CODE_ERROR
    told = attributes(span)
    assert told["error.type"] == "INTERNAL"
    assert told["gen_ai.usage.output_tokens"] == 0
    assert "gen_ai.response.finish_reasons" not in told


def test_what_was_not_sent_yet_is_sent_when_the_server_stops(collector, monkeypatch):
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "60000")
    with traced(collector) as serving:
        serving.client.generate([5], max_tokens=2)
        assert collector.spans == []
    assert len(collector.spans) == 4


def test_without_the_library_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(ConfigError, match=r"pip install 'expertmesh\[otel\]'"):
        RequestSpans("http://127.0.0.1:4317", MODEL)


@pytest.mark.parametrize(
    ("traceparent", "is_valid"),
    [
        (TRACEPARENT, True),
        (f"00-{TRACE}-{CALLER}-00", True),
        (f"cc-{TRACE}-{CALLER}-01-later-versions-add", True),
        (f"00-{TRACE}-{CALLER}-01-more", False),
        (f"ff-{TRACE}-{CALLER}-01", False),
        (f"00-{TRACE.upper()}-{CALLER}-01", False),
        (f"00-{TRACE}-{'0' * 16}-01", False),
        (f"00-{TRACE}-{CALLER}", False),
        ("", False),
        (None, False),
    ],
)
def test_trace_contexts_are_read_as_the_standard_says(traceparent, is_valid):
    context = parse_traceparent(traceparent)
    assert (context is not None) == is_valid
    if context:
        assert (context.trace_id, context.span_id) == (TRACE, CALLER)
