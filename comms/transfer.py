"""The weights in one slot, from the rank that holds them to the rank that wants them.

Beside the collectives and never in their way: every rank runs a `TransferServer` on a port and in
threads of its own, within a budget of bytes per second, and whoever wants weights pulls them.
Whatever goes wrong ends that one fetch and nothing else.
"""

import os
import secrets
import select
import socket
import threading
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from comms.groups import ParallelGroups
from comms.transfer_server import ReadSlot, TransferServer
from comms.transfer_wire import (
    ANSWER,
    CHUNK,
    FETCH,
    NONCE_BYTES,
    REQUEST,
    SERVE,
    family_of,
    new_nonce,
    prove,
    proves,
)

_POLL_S = 0.05  # how soon a wait notices that it is over
_SECRET_BYTES = 32


class TransferError(RuntimeError):
    """A fetch failed; says who waited for whom, for what, and how many bytes had come."""


class Source(NamedTuple):
    """Where a rank serves its slots."""

    rank: int
    host: str
    port: int


@dataclass(frozen=True, kw_only=True)
class TransferClient:
    """Fetches for `rank` from `sources`, one for each rank of the world in order.

    stall_s: so long may a source send nothing.
    """

    rank: int
    sources: Sequence[Source]
    secret: bytes = field(repr=False)
    stall_s: float = 5.0

    def fetch(
        self,
        source_rank: int,
        layer: int,
        slot: int,
        into: memoryview,
        *,
        deadline: float,
        stop: threading.Event,
    ) -> None:
        """Fill `into` with what is in local slot `slot` of that rank.

        Raises TransferError when it is not complete at `deadline` (on time.monotonic), when nothing
        comes for `stall_s`, soon after `stop` was set, and when the source cannot be reached, does
        not know the secret, holds something of another size or sends damaged chunks. What `into`
        then holds is undefined.
        """
        source = self.sources[source_rank]
        with socket.socket(family_of(source.host), socket.SOCK_STREAM) as sock:
            sock.setblocking(False)
            _Fetch(sock, source, into, self, f"layer {layer}, slot {slot}", deadline, stop).run(
                layer, slot
            )


def connect_transfers(
    groups: ParallelGroups, read: ReadSlot, *, bytes_per_s: float | None, stall_s: float = 5.0
) -> tuple[TransferServer, TransferClient]:
    """Start serving what `read` finds, and learn where the others do. Collective over the world.

    bytes_per_s: the budget of this rank's server, None = no limit.
    """
    world = groups.world
    secret = world.broadcast_bytes(
        secrets.token_bytes(_SECRET_BYTES) if world.idx == 0 else None, 0
    )
    server = TransferServer(read, host=groups.host, secret=secret, bytes_per_s=bytes_per_s)
    try:
        mine = torch.frombuffer(
            bytearray(f"{groups.host} {server.port}", "ascii"), dtype=torch.uint8
        )
        answers = world.exchange([mine] * world.size, "transfer addresses")
    except BaseException:
        server.close()
        raise
    sources = []
    for rank, answer in enumerate(answers):
        host, port = bytes(answer.tolist()).decode("ascii").split()
        sources.append(Source(rank, host, int(port)))
    return server, TransferClient(rank=groups.rank, sources=sources, secret=secret, stall_s=stall_s)


class _Fetch:
    """One request. Waits in short turns, so that it can be called off from any thread."""

    def __init__(
        self,
        sock: socket.socket,
        source: Source,
        into: memoryview,
        client: TransferClient,
        what: str,
        deadline: float,
        stop: threading.Event,
    ) -> None:
        self._sock, self._source, self._into, self._what = sock, source, into, what
        self._client, self._deadline, self._stop = client, deadline, stop
        self._received = 0
        self._started = self._last_progress = time.monotonic()

    def run(self, layer: int, slot: int) -> None:
        secret = self._client.secret
        try:
            self._connect()
            theirs, mine = self._read(NONCE_BYTES), new_nonce()
            request = REQUEST.pack(mine, prove(secret, FETCH, theirs, mine), layer, slot)
            self._sock.send(request)  # small: taken in one go
            proof, num_bytes = ANSWER.unpack(self._read(ANSWER.size))
            if not proves(proof, secret, SERVE, theirs, mine):
                raise self._error("it does not know the secret")
            if num_bytes != self._into.nbytes:
                raise self._error(f"it holds {num_bytes:,} bytes there")
            while self._received < num_bytes:
                self._take_chunk()
        except OSError as error:
            raise self._error(error.strerror or str(error)) from error

    def _connect(self) -> None:
        with suppress(BlockingIOError):
            self._sock.connect((self._source.host, self._source.port))
        self._wait(select.POLLOUT)
        code = self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            raise OSError(code, f"{self._source.host}:{self._source.port}: {os.strerror(code)}")

    def _take_chunk(self) -> None:
        length, checksum = CHUNK.unpack(self._read(CHUNK.size))
        if not 0 < length <= self._into.nbytes - self._received:
            raise self._error(f"a chunk claims {length:,} bytes")
        chunk = self._into[self._received : self._received + length]
        for here in self._fill(chunk):
            self._received += here
        if zlib.crc32(chunk) != checksum:
            raise self._error(f"the {length:,} bytes that came last have another checksum")

    def _read(self, num_bytes: int) -> bytes:
        buffer = bytearray(num_bytes)
        for _ in self._fill(memoryview(buffer)):
            pass
        return bytes(buffer)

    def _fill(self, view: memoryview) -> Iterator[int]:
        """Fill `view`; yields how many bytes came, as they come."""
        while view.nbytes:
            try:
                here = self._sock.recv_into(view)
            except BlockingIOError:
                self._wait(select.POLLIN)
                continue
            if here == 0:
                raise self._error("it closed the connection")
            self._last_progress = time.monotonic()
            self._check_time()  # also where there is always something: it may come too slowly
            yield here
            view = view[here:]

    def _wait(self, event: int) -> None:
        poll = select.poll()
        poll.register(self._sock, event)
        while not poll.poll(_POLL_S * 1000):
            self._check_time()

    def _check_time(self) -> None:
        now = time.monotonic()
        if self._stop.is_set():
            raise self._error("called off")
        if now > self._deadline:
            raise self._error(f"not complete after {now - self._started:.3g} s")
        if now - self._last_progress > self._client.stall_s:
            raise self._error(f"nothing came for {self._client.stall_s:g} s")

    def _error(self, reason: str) -> TransferError:
        return TransferError(
            f"rank {self._client.rank} waited for rank {self._source.rank} to send {self._what} "
            f"({self._received:,} of {self._into.nbytes:,} bytes came): {reason}"
        )
