"""Strangers at the sockets between gateway and leaders: nothing that they send arrives."""

import asyncio
import contextlib
import time

import msgpack
import pytest
import zmq

from cluster.engine.link_keys import LinkKeys
from cluster.engine.mailbox import ZmqMailbox
from cluster.server import wire
from cluster.server.leaders import LeaderLinks

LOOPBACK = "127.0.0.1"
KEYS = LinkKeys.make()
STEP = {"type": "step", "replica": 0, "events": [], "stats": {"step": 7}}


@contextlib.contextmanager
def pushing(address, guard=lambda socket: None):
    """A socket of somebody who has found the address."""
    with zmq.Context() as context, context.socket(zmq.PUSH) as socket:
        socket.setsockopt(zmq.LINGER, 0)
        guard(socket)
        socket.connect(address)
        yield socket


def _poses_as_member(socket):
    """Knows how we encrypt, but not our keys."""
    LinkKeys.make().guard_connected(socket)


def _knows_a_key_of_his_own_only(socket):
    socket.curve_publickey, socket.curve_secretkey = zmq.curve_keypair()
    socket.curve_serverkey = zmq.curve_keypair()[0]


STRANGERS = [lambda socket: None, _poses_as_member, _knows_a_key_of_his_own_only]


@pytest.mark.parametrize("guard", STRANGERS)
def test_a_leader_takes_frames_of_its_gateway_only(guard):
    mailbox = ZmqMailbox(LOOPBACK, KEYS)
    with contextlib.closing(mailbox), pushing(mailbox.address, guard) as stranger:
        for _ in range(50):
            with contextlib.suppress(zmq.Again):
                stranger.send(wire.pack_signal("stop"), zmq.NOBLOCK)
        with pushing(mailbox.address, KEYS.guard_connected) as gateway:
            gateway.send(wire.pack_abort("ours"))
            frames = mailbox.receive(10)
            deadline = time.monotonic() + 0.3
            while time.monotonic() < deadline:
                frames += mailbox.receive(0.05)
    assert frames == [{"type": "abort", "request_id": "ours"}]


@pytest.mark.parametrize("guard", STRANGERS)
def test_the_gateway_takes_frames_of_its_leaders_only(guard):
    async def first_frame():
        links = LeaderLinks(LOOPBACK, KEYS)
        links.attach(0, "tcp://127.0.0.1:1")
        with (
            pushing(links.address, guard) as stranger,
            pushing(links.address, KEYS.guard_connected) as leader,
        ):
            with contextlib.suppress(zmq.Again):
                stranger.send(msgpack.packb(STEP | {"stats": {"step": 666}}), zmq.NOBLOCK)
            await asyncio.sleep(0.3)
            leader.send(msgpack.packb(STEP))
            async with asyncio.timeout(10):
                frame = await anext(links.frames())
        await links.close()
        return frame

    assert asyncio.run(first_frame()).stats.step == 7


def test_a_leader_does_not_send_its_tokens_to_a_stranger():
    """One who has taken over the gateway's port, say."""
    with zmq.Context() as context, context.socket(zmq.PULL) as stranger:
        public, secret = zmq.curve_keypair()
        stranger.curve_server, stranger.curve_publickey, stranger.curve_secretkey = (
            True,
            public,
            secret,
        )
        port = stranger.bind_to_random_port(f"tcp://{LOOPBACK}")
        mailbox = ZmqMailbox(LOOPBACK, KEYS)
        with contextlib.closing(mailbox):
            mailbox.connect(f"tcp://{LOOPBACK}:{port}")
            with contextlib.suppress(zmq.Again):
                mailbox.send(STEP)
            assert not stranger.poll(300)


def test_what_is_printed_of_the_keys_is_not_the_keys():
    assert KEYS.secret.decode() not in repr(KEYS)
    assert KEYS.public.decode() not in repr(KEYS)
