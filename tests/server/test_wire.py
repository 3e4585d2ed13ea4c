"""Frames from the network are checked: a step frame, or WireError, and nothing else."""

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.server import wire

SCALARS = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text()
VALUES = st.recursive(
    SCALARS | st.binary(max_size=8),
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)
EVENTS = st.lists(
    st.tuples(
        st.text(),
        st.none() | st.integers(0, 2**63 - 1),
        st.none() | st.text(),
        st.none() | st.integers(0, 2**63 - 1),
        st.none() | st.text(),
    ),
    max_size=5,
)


@given(data=st.binary(max_size=64) | VALUES.map(msgpack.packb))
def test_arbitrary_data_is_a_wire_error(data):
    with pytest.raises(wire.WireError):
        wire.parse_step(data)


@given(
    replica=VALUES, events=VALUES | st.lists(st.lists(VALUES, min_size=5, max_size=5)), stats=VALUES
)
def test_step_frames_of_arbitrary_parts_are_parsed_or_refused(replica, events, stats):
    message = {"type": "step", "replica": replica, "events": events, "stats": stats}
    try:
        frame = wire.parse_step(msgpack.packb(message))
    except wire.WireError:
        return
    assert frame.replica == replica
    assert [list(vars(event).values()) for event in frame.events] == events


@given(replica=st.integers(0, 2**63 - 1), events=EVENTS, running=st.integers(0, 99))
def test_valid_frames_come_through_whole(replica, events, running):
    stats = {"running": running, "waiting": 1, "kv_usage": 0.5, "step": 3, "epoch": 2, "new": 0}
    message = {"type": "step", "replica": replica, "events": events, "stats": stats}
    frame = wire.parse_step(msgpack.packb(message))
    assert frame.replica == replica
    assert [tuple(vars(event).values()) for event in frame.events] == events
    assert frame.stats == wire.ReplicaStats(
        running=running, waiting=1, kv_usage=0.5, step=3, epoch=2
    )


def test_deep_nesting_is_refused():
    with pytest.raises(wire.WireError):
        wire.parse_step(b"\x91" * 100_000 + b"\xc0")
