"""Whatever an engine says of a request, in whatever order: its client gets an end, and others live on."""

import itertools

import msgpack
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster.engine.sequence import RoutedExperts, TokenEvent, TokenLogprob
from cluster.server.client import ClientError
from tests.server.serving import VOCAB_SIZE, serve
from tests.server.stub_leader import completion

PROMPT = [5, 6, 7]
TOKENS = st.integers(0, VOCAB_SIZE - 1) | st.integers(0, 2**63 - 1)
LOGPROBS = st.builds(
    TokenLogprob, TOKENS, st.floats(allow_nan=False), st.integers(0, 2**63 - 1), st.just(()), st.just(())
)  # fmt: skip
EVENTS = st.builds(
    TokenEvent,
    st.integers(0, 2),  # of the choices of one request, the last of which there is not
    st.none() | TOKENS,
    st.none() | st.sampled_from(["stop", "length", "abort", "error", "bored"]),
    st.none() | TOKENS,
    st.none() | st.text(max_size=5),
    st.none() | LOGPROBS,
    st.lists(LOGPROBS, max_size=2).map(tuple),
    st.just(()) | st.just((RoutedExperts(0, 1, 1, b"ab"),)),
    st.none() | st.integers(0, 2**63 - 1),
    st.none() | st.floats(0, 1e12),
)
ids = itertools.count()


@pytest.fixture(scope="module")
def serving():
    with serve(num_replicas=2) as serving:
        serving.leaders[0].held.set()
        yield serving


def ending(stream):
    try:
        *_, last = stream
    except ClientError as error:
        return error.code
    return "OK" if last.HasField("usage") else "without usage"


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(steps=st.lists(st.lists(EVENTS, max_size=4), max_size=4))
def test_a_request_ends_whatever_is_said_of_it(serving, steps):
    name = f"odd-{next(ids)}"
    names = [name, f"{name}#1", f"{name}#2"]
    stream = serving.client.generate_stream(
        PROMPT, n=2, request_id=name, stop=["ab"], data_parallel_rank=0, logprobs=1
    )
    next(stream)
    last = [TokenEvent(choice, finish_reason="length") for choice in range(3)]
    for events in [*steps, last]:
        named = [event._replace(request_id=names[event.request_id]) for event in events]
        message = {"type": "step", "replica": 0, "events": named, "stats": {}}
        serving.leaders[0].raw_frames.append(msgpack.packb(message))
    assert ending(stream) in {"OK", "INTERNAL", "RESOURCE_EXHAUSTED"}
    assert serving.num_in_flight() == 0
    other = serving.client.generate(PROMPT, data_parallel_rank=1, seed=1, max_tokens=3)
    assert list(other.token_ids) == completion(PROMPT, 1, VOCAB_SIZE, 3)
