"""The sockets to leaders: bounded, never blocking, and no abort is lost."""

import contextlib
import time

import msgpack
import pytest
import zmq

from cluster.server import wire
from cluster.server.leaders import Replica

HWM = 4


@pytest.fixture
def make_socket():
    with contextlib.ExitStack() as stack:
        context = stack.enter_context(zmq.Context())
        yield lambda kind: stack.enter_context(context.socket(kind))


def test_aborts_that_find_the_queue_full_are_sent_later_in_order(make_socket, tmp_path):
    address = f"ipc://{tmp_path}/leader"  # nobody listens yet, so nothing is read
    socket = make_socket(zmq.PUSH)
    socket.setsockopt(zmq.SNDHWM, HWM)
    socket.setsockopt(zmq.LINGER, 0)
    socket.connect(address)
    replica = Replica(0, address, socket, last_heard=0.0)
    sent = 0
    while replica.try_send(wire.pack_abort(str(sent))):
        sent += 1
    assert 1 <= sent <= HWM
    for idx in range(sent, sent + 3):
        replica.send_later(wire.pack_abort(str(idx)))
    assert len(replica.unsent) == 3
    assert not replica.try_send(wire.pack_signal("wake")), "nothing overtakes what waits"

    leader = make_socket(zmq.PULL)
    leader.bind(address)
    got = []
    deadline = time.monotonic() + 20
    while len(got) < sent + 3:
        assert time.monotonic() < deadline, got
        replica.flush()
        if leader.poll(50):
            got.append(msgpack.unpackb(leader.recv())["request_id"])
    assert got == [str(idx) for idx in range(sent + 3)]
    assert not replica.unsent
