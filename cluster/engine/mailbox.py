"""How a leader gets requests and leaves its results: ZeroMQ in a cluster, plain lists offline.

Frames are msgpack maps with a "type" (see `cluster/server/gateway.py` for the list). A frame that
is too large, malformed or not a map is dropped with a log line: it cannot hurt the running batch.
"""

import logging
from collections import deque
from collections.abc import Iterable
from typing import Any, Protocol

import msgpack
import zmq

from cluster.engine.link_keys import LinkKeys
from cluster.engine.sequence import TokenEvent

Frame = dict[str, Any]
MAX_FRAME_BYTES = 64 << 20
MAX_QUEUED_FRAMES = 10_000

logger = logging.getLogger(__name__)


class Mailbox(Protocol):
    def receive(self, timeout_s: float) -> list[Frame]:
        """All frames that are there, waiting up to `timeout_s` seconds for the first."""

    def send(self, frame: Frame) -> None:
        """Leave one frame; never blocks. Raises GatewayLostError when nobody takes frames out."""


class GatewayLostError(RuntimeError):
    """The gateway has read nothing for thousands of steps. Dropping frames would lose tokens."""


class ZmqMailbox:
    """Binds a PULL socket for the gateway's frames and pushes step frames to the gateway.

    keys: of the cluster, without which nobody can connect or be connected to. None: anybody can.
    """

    def __init__(self, host: str, keys: LinkKeys | None = None) -> None:
        self._context = zmq.Context()
        self._inbox = self._context.socket(zmq.PULL)
        self._inbox.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
        self._outbox = self._context.socket(zmq.PUSH)
        if keys:
            keys.guard_bound(self._inbox)
            keys.guard_connected(self._outbox)
        port = self._inbox.bind_to_random_port(f"tcp://{host}")
        self.address = f"tcp://{host}:{port}"
        self._outbox.setsockopt(zmq.SNDHWM, MAX_QUEUED_FRAMES)

    def connect(self, gateway_address: str) -> None:
        self._outbox.connect(gateway_address)

    def receive(self, timeout_s: float) -> list[Frame]:
        frames: list[Frame] = []
        if not self._inbox.poll(round(timeout_s * 1000)):
            return frames
        while True:
            try:
                frame = unpack(self._inbox.recv(zmq.NOBLOCK))
            except zmq.Again:
                return frames
            if frame is not None:
                frames.append(frame)

    def send(self, frame: Frame) -> None:
        try:
            self._outbox.send(msgpack.packb(frame), zmq.NOBLOCK)
        except zmq.Again:
            raise GatewayLostError(
                f"the gateway has left {MAX_QUEUED_FRAMES} step frames unread"
            ) from None

    def close(self) -> None:
        """Deliver what was sent, for at most a second, and free the sockets."""
        self._inbox.close(linger=0)
        self._outbox.close(linger=1000)
        self._context.term()


class LocalMailbox:
    """A fixed list of requests, and a `stop` once each of them has ended: no gateway, no sockets.

    `post` adds another frame, from any thread.
    """

    def __init__(self, requests: Iterable[Frame]) -> None:
        self._unread = deque(requests)
        self._unfinished = {frame["request_id"] for frame in self._unread}
        self.events: list[TokenEvent] = []

    def post(self, frame: Frame) -> None:
        self._unread.append(frame)

    def receive(self, timeout_s: float) -> list[Frame]:
        frames = [self._unread.popleft() for _ in range(len(self._unread))]
        return frames if self._unfinished else [*frames, {"type": "stop"}]

    def send(self, frame: Frame) -> None:
        for event in frame["events"]:
            self.events.append(event)
            if event.finish_reason is not None:
                self._unfinished.discard(event.request_id)


def unpack(data: bytes) -> Frame | None:
    """Decode one frame, or log and return None when it is not a msgpack map with a type."""
    try:
        frame = msgpack.unpackb(data, strict_map_key=True, max_ext_len=0)
    except (ValueError, msgpack.UnpackException) as error:
        logger.warning("dropped a malformed frame of %d bytes: %s", len(data), error)
        return None
    if not isinstance(frame, dict) or not isinstance(frame.get("type"), str):
        logger.warning("dropped a frame of %d bytes that is not a map with a type", len(data))
        return None
    return frame
