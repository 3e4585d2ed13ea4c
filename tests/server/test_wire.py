"""Frames from the network are checked: a step frame, or WireError, and nothing else."""

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.engine.sequence import RoutedExperts, TokenEvent, TokenLogprob
from cluster.server import wire

SCALARS = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text()
VALUES = st.recursive(
    SCALARS | st.binary(max_size=8),
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)
NUMBERS = st.integers(0, 2**63 - 1)
REALS = st.floats(allow_nan=False)


@st.composite
def logprobs(draw):
    top = draw(st.lists(st.tuples(NUMBERS, REALS), max_size=3))
    return TokenLogprob(
        draw(NUMBERS),
        draw(REALS),
        draw(NUMBERS),
        tuple(i for i, _ in top),
        tuple(p for _, p in top),
    )


@st.composite
def routed_experts(draw):
    tokens, layers, k = (draw(st.integers(1, 3)) for _ in range(3))
    size = 2 * tokens * layers * k
    return RoutedExperts(draw(NUMBERS), layers, k, draw(st.binary(min_size=size, max_size=size)))


EVENTS = st.lists(
    st.builds(
        TokenEvent,
        st.text(),
        st.none() | NUMBERS,
        st.none() | st.text(),
        st.none() | NUMBERS,
        st.none() | st.text(),
        st.none() | logprobs(),
        st.lists(logprobs(), max_size=2).map(tuple),
        st.lists(routed_experts(), max_size=2).map(tuple),
        st.none() | NUMBERS,
        st.none() | st.floats(0, 1e9),
    ),
    max_size=5,
)


@given(data=st.binary(max_size=64) | VALUES.map(msgpack.packb))
def test_arbitrary_data_is_a_wire_error(data):
    with pytest.raises(wire.WireError):
        wire.parse_step(data)


@given(
    replica=VALUES | NUMBERS,
    events=VALUES | st.lists(st.lists(VALUES, min_size=4, max_size=11)),
    stats=VALUES | st.dictionaries(st.sampled_from(["running", "kv_usage", "phases"]), VALUES),
)
def test_step_frames_of_arbitrary_parts_are_parsed_or_refused(replica, events, stats):
    message = {"type": "step", "replica": replica, "events": events, "stats": stats}
    try:
        frame = wire.parse_step(msgpack.packb(message))
    except wire.WireError:
        return
    assert frame.replica == replica
    assert [list(event[:5]) for event in frame.events] == [event[:5] for event in events]


@given(base=EVENTS, data=st.data())
def test_one_wrong_part_deep_inside_is_refused_or_read_as_it_stands(base, data):
    """Valid events of which one value, however deep, is replaced by anything."""
    message = {"type": "step", "replica": 0, "events": base, "stats": {}}
    events = msgpack.unpackb(msgpack.packb(message))["events"]
    place = events
    while isinstance(place, list) and place:
        idx = data.draw(st.integers(0, len(place) - 1))
        if not isinstance(place[idx], list) or data.draw(st.booleans()):
            place[idx] = data.draw(VALUES)
            break
        place = place[idx]
    try:
        frame = wire.parse_step(msgpack.packb(message | {"events": events}))
    except wire.WireError:
        return
    again = msgpack.packb(message | {"events": frame.events})
    assert wire.parse_step(again).events == frame.events


@given(replica=NUMBERS, events=EVENTS, running=st.integers(0, 99), step_ms=st.floats(0, 1e6))
def test_valid_frames_come_through_whole(replica, events, running, step_ms):
    stats = {"running": running, "waiting": 1, "kv_usage": 0.5, "step": 3, "epoch": 2, "new": 0}
    stats |= {"prefix_hits": 7, "step_ms": step_ms, "phases": {"schedule": 0.25}}
    message = {"type": "step", "replica": replica, "events": events, "stats": stats}
    frame = wire.parse_step(msgpack.packb(message))
    assert frame.replica == replica
    assert list(frame.events) == events
    del stats["new"]
    assert frame.stats == wire.ReplicaStats(**stats)


@given(events=EVENTS)
def test_events_may_leave_out_their_last_fields(events):
    short = [list(event[:5]) for event in events]
    message = {"type": "step", "replica": 0, "events": short, "stats": {}}
    frame = wire.parse_step(msgpack.packb(message))
    assert list(frame.events) == [TokenEvent(*event[:5]) for event in events]


@pytest.mark.parametrize(
    "routed",
    [[0, 1, 1, b"x"], [0, 0, 1, b""], [0, 2, 1, b"xxxxxx"], [0, 1, 1, "xx"], [-1, 1, 1, b"xx"], []],
)
def test_routed_experts_of_a_wrong_size(routed):
    event = ["id", 1, None, None, None, None, [], [routed], None, None]
    message = {"type": "step", "replica": 0, "events": [event], "stats": {}}
    (parsed,) = wire.parse_step(msgpack.packb(message)).events
    assert "routed" in parsed.error


def test_a_malformed_event_costs_its_own_request_only():
    good = ["good", 1, None, None, None]
    bad = ["bad", 2, None, None, None, [3, float("nan"), 1, [], []], [], [], None, None]
    message = {"type": "step", "replica": 0, "events": [good, bad, good], "stats": {}}
    first, failed, last = wire.parse_step(msgpack.packb(message)).events
    assert first == last == TokenEvent(*good)
    assert (failed.request_id, failed.token_id, failed.finish_reason) == ("bad", None, None)
    assert "logprob is not a number" in failed.error
    for nobodys in ([], [3], {}, None):
        with pytest.raises(wire.WireError):
            wire.parse_step(msgpack.packb(message | {"events": [good, nobodys]}))


def test_deep_nesting_is_refused():
    with pytest.raises(wire.WireError):
        wire.parse_step(b"\x91" * 100_000 + b"\xc0")
