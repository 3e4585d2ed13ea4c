"""The sockets between the gateway and the leaders: one PULL for all, one PUSH to each."""

import asyncio
import ipaddress
import logging
import time
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import zmq
import zmq.asyncio

from cluster.engine.link_keys import LinkKeys
from cluster.server import wire

MAX_QUEUED_FRAMES = 4096
_LINGER_MS = 500

logger = logging.getLogger(__name__)


@dataclass
class Replica:
    """What the gateway knows of one DP replica; times are `time.monotonic()` seconds."""

    idx: int
    address: str
    socket: zmq.Socket[bytes]
    last_heard: float
    stats: wire.ReplicaStats = field(default_factory=wire.ReplicaStats)
    in_flight: int = 0
    suspect: bool = False
    """Silent for longer than the timeout; gets new requests only if all others are silent too."""
    unsent: deque[bytes] = field(default_factory=deque)
    """Aborts that found the socket's queue full; at most one per request ever in flight."""

    def __str__(self) -> str:
        return f"replica {self.idx} ({self.address})"

    @property
    def kv_usage(self) -> float:
        """Share of KV blocks that sequences hold, as last reported."""
        return self.stats.kv_usage

    def try_send(self, frame: bytes) -> bool:
        """Never blocks; False if the leader has not read thousands of frames."""
        if self.unsent:
            return False
        try:
            self.socket.send(frame, zmq.NOBLOCK)
        except zmq.Again:
            return False
        return True

    def send_later(self, frame: bytes) -> None:
        """Send now, or as soon as `flush` finds room."""
        if not self.try_send(frame):
            self.unsent.append(frame)

    def flush(self) -> None:
        pending, self.unsent = self.unsent, deque()
        while pending and self.try_send(pending[0]):
            pending.popleft()
        self.unsent = pending


class LeaderLinks:
    """Binds the gateway's inbox on one explicit address and connects to leaders.

    Create and use it inside a running event loop. ZeroMQ reconnects by itself; silence is judged
    by the gateway, from `Replica.last_heard`. keys: of the cluster; None: anybody can send frames.
    """

    def __init__(self, bind_host: str, keys: LinkKeys | None = None) -> None:
        _refuse_wildcard(bind_host)
        self._keys = keys
        self._context = zmq.asyncio.Context()
        self._inbox = self._context.socket(zmq.PULL)
        self._inbox.setsockopt(zmq.RCVHWM, MAX_QUEUED_FRAMES)
        self._inbox.setsockopt(zmq.MAXMSGSIZE, wire.MAX_FRAME_BYTES)
        self._inbox.setsockopt(zmq.IPV6, ":" in bind_host)
        if keys:
            keys.guard_bound(self._inbox)
        host = f"[{bind_host}]" if ":" in bind_host else bind_host
        port = self._inbox.bind_to_random_port(f"tcp://{host}")
        self.address = f"tcp://{host}:{port}"
        self.replicas: dict[int, Replica] = {}

    def attach(self, idx: int, address: str) -> None:
        """Connect to a leader's PULL socket; a replica that is attached again has moved there."""
        # A plain socket of the same context: sending never waits, so there is nothing to await.
        plain: zmq.Context[zmq.Socket[bytes]] = zmq.Context.shadow(self._context.underlying)
        socket = plain.socket(zmq.PUSH)
        socket.setsockopt(zmq.SNDHWM, MAX_QUEUED_FRAMES)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.IPV6, "[" in address)
        if self._keys:
            self._keys.guard_connected(socket)
        socket.connect(address)
        previous = self.replicas.get(idx)
        if previous:
            previous.socket.close(linger=0)
        self.replicas[idx] = Replica(idx, address, socket, last_heard=time.monotonic())

    async def frames(self) -> AsyncIterator[wire.StepFrame]:
        """Checked step frames of all leaders, for ever; malformed ones are logged and dropped."""
        while True:
            # Let others run: ZeroMQ hands out what it has queued without ever suspending.
            await asyncio.sleep(0)
            data = await self._inbox.recv()
            try:
                frame = wire.parse_step(data)
                replica = self.replicas[frame.replica]
            except wire.WireError as error:
                logger.warning("dropped a malformed frame of %d bytes: %s", len(data), error)
                continue
            except KeyError:
                logger.warning("dropped a frame of replica %d: not attached", frame.replica)
                continue
            replica.last_heard = time.monotonic()
            replica.stats = frame.stats
            yield frame

    async def close(self) -> None:
        """Send `stop` to every leader and free the sockets; takes at most half a second."""
        for replica in self.replicas.values():
            replica.try_send(wire.pack_signal("stop"))
            replica.socket.close(linger=_LINGER_MS)
        self._inbox.close(linger=0)
        await asyncio.to_thread(self._context.term)


def _refuse_wildcard(host: str) -> None:
    """The inbox trusts who can reach it, so it listens on one address, never on all."""
    try:
        wildcard = ipaddress.ip_address(host).is_unspecified
    except ValueError:
        wildcard = host in ("", "*")
    if wildcard:
        raise ValueError(f"bind_host = {host!r}: must be one address of this host, not all of them")
