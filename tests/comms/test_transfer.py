"""Transfers: bytes arrive whole or not at all, in time or with an error, and nothing is left over."""

import os
import secrets
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from comms import budget, transfer_server
from comms.budget import ByteBudget
from comms.groups import ParallelGroups
from comms.topology import Topology
from comms.transfer import Source, TransferClient, TransferError, connect_transfers
from comms.transfer_server import TransferServer
from comms.transfer_wire import ANSWER, CHUNK, FETCH, NONCE_BYTES, REQUEST, new_nonce, prove
from tests.comms.faulty_proxy import Fault, FaultyProxy

SECRET = b"known to all ranks"
CHUNK_BYTES = 1000
DATA = os.urandom(10 * CHUNK_BYTES + 1)
NEVER = threading.Event()
PAYLOAD_STARTS = NONCE_BYTES + ANSWER.size + CHUNK.size


def client_of(port: int, secret: bytes = SECRET, stall_s: float = 5.0) -> TransferClient:
    sources = [Source(0, "127.0.0.1", 1), Source(1, "127.0.0.1", port)]
    return TransferClient(rank=0, sources=sources, secret=secret, stall_s=stall_s)


def get(
    client: TransferClient, num_bytes: int, *, layer: int = 0, slot: int = 0, within_s: float = 20.0
) -> bytes:
    into = bytearray(num_bytes)
    deadline = time.monotonic() + within_s
    client.fetch(1, layer, slot, memoryview(into), deadline=deadline, stop=NEVER)
    return bytes(into)


def serving(server: TransferServer) -> int:
    """Connections that it has open."""
    return [t.name for t in threading.enumerate()].count(f"transfer-serve:{server.port}")


def threads_of(server: TransferServer) -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.endswith(f":{server.port}")]


@pytest.fixture(scope="module")
def server():
    server = TransferServer(
        lambda layer, slot: memoryview(DATA)[: layer * 100_000 + slot] or None,
        host="127.0.0.1",
        secret=SECRET,
        chunk_bytes=CHUNK_BYTES,
    )
    yield server
    server.close()
    assert threads_of(server) == []


@pytest.mark.parametrize(
    "num_bytes", [1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 3 * CHUNK_BYTES, len(DATA)]
)
def test_what_is_read_there_arrives_here(server, num_bytes):
    assert get(client_of(server.port), num_bytes, slot=num_bytes) == DATA[:num_bytes]


def test_many_at_once(server):
    client, sizes = client_of(server.port), list(range(1, len(DATA), 211))
    with ThreadPoolExecutor(16) as pool:
        parts = pool.map(lambda size: get(client, size, slot=size), sizes)
    assert [len(p) for p in parts if p == DATA[: len(p)]] == sizes


def test_a_wrong_size_and_an_empty_slot_are_named(server):
    client = client_of(server.port)
    with pytest.raises(TransferError, match=r"rank 0 waited for rank 1 to send layer 0, slot 7 "):
        get(client, 8, slot=7)
    with pytest.raises(TransferError, match="holds 7 bytes there"):
        get(client, 8, slot=7)
    with pytest.raises(TransferError, match="holds 0 bytes there"):
        get(client, 8, slot=0)


def test_nothing_is_served_to_who_does_not_know_the_secret():
    asked = []
    server = TransferServer(lambda *item: asked.append(item), host="127.0.0.1", secret=SECRET)
    with pytest.raises(TransferError, match=r"closed the connection|reset"):
        get(client_of(server.port, secret=b"guessed"), 8)
    server.close()
    assert asked == []


def test_nothing_is_taken_from_who_does_not_know_the_secret():
    """The impostor plays the protocol, but for the proof."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def impostor() -> None:
            sock, _ = listener.accept()
            with sock:
                sock.sendall(secrets.token_bytes(NONCE_BYTES))
                sock.recv(REQUEST.size, socket.MSG_WAITALL)
                sock.sendall(ANSWER.pack(secrets.token_bytes(32), 8) + bytes(100))

        thread = threading.Thread(target=impostor)
        thread.start()
        with pytest.raises(TransferError, match="does not know the secret"):
            get(client_of(listener.getsockname()[1]), 8)
        thread.join()


@settings(max_examples=40, deadline=None)
@given(junk=st.one_of(st.binary(max_size=3 * REQUEST.size), st.just(b"GET / HTTP/1.1\r\n\r\n" * 9)))
def test_strangers_hurt_only_their_own_connection(server, junk):
    answer = b""
    with socket.create_connection(("127.0.0.1", server.port)) as stranger:
        stranger.settimeout(20.0)
        with suppress(OSError):  # it hung up with our junk unread
            stranger.sendall(junk)
            assert get(client_of(server.port), 99, slot=99) == DATA[:99]
            stranger.shutdown(socket.SHUT_WR)
            while data := stranger.recv(4096):
                answer += data
    assert len(answer) <= NONCE_BYTES


def test_too_many_callers_are_refused_and_leave_room_when_they_go(server, monkeypatch):
    while serving(server):  # of the test before
        time.sleep(0.001)
    monkeypatch.setattr(transfer_server, "_MAX_CONNECTIONS", 3)
    silent = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(3)]
    for sock in silent:
        assert len(sock.recv(NONCE_BYTES, socket.MSG_WAITALL)) == NONCE_BYTES
    with pytest.raises(TransferError, match=r"closed the connection|reset|Broken pipe"):
        get(client_of(server.port), 5, slot=5)
    for sock in silent:
        sock.close()
    while serving(server):
        time.sleep(0.001)
    assert get(client_of(server.port), 5, slot=5) == DATA[:5]


@pytest.mark.parametrize("after", [0, 5, NONCE_BYTES, PAYLOAD_STARTS - 1, PAYLOAD_STARTS + 1500])
@pytest.mark.parametrize("kind", ["cut", "stall"])
def test_a_broken_or_silent_connection_is_named(server, kind, after):
    with FaultyProxy(server.port) as proxy:
        proxy.faults.append(Fault(kind, after))
        reason, stall_s = {
            "cut": (r"closed the connection|reset|Broken pipe", 5.0),
            "stall": (r"nothing came for 0\.5 s", 0.5),
        }[kind]
        with pytest.raises(TransferError, match=reason) as error:
            get(client_of(proxy.port, stall_s=stall_s), len(DATA), slot=len(DATA))
        before = max(0, after - PAYLOAD_STARTS)
        came = before - before // (CHUNK_BYTES + CHUNK.size) * CHUNK.size
        if kind == "stall":
            assert f"({came:,} of 10,001 bytes came)" in str(error.value)
        assert get(client_of(proxy.port), len(DATA), slot=len(DATA)) == DATA


def test_bytes_that_come_too_slowly_are_given_up_at_the_deadline():
    """Never silent for long: one byte and another. 20 of them a second, and 10,000 wanted."""
    server = TransferServer(
        lambda *_: memoryview(DATA),
        host="127.0.0.1",
        secret=SECRET,
        bytes_per_s=20,
        chunk_bytes=1,
    )
    with pytest.raises(TransferError, match=r"not complete after 0\.\d+ s"):
        get(client_of(server.port, stall_s=60.0), len(DATA), within_s=0.3)
    server.close()
    assert threads_of(server) == []


def test_slow_is_not_stalled():
    """A chunk every 50 ms, for longer than a source may be silent."""
    server = TransferServer(
        lambda *_: memoryview(DATA)[: 40 * 250],
        host="127.0.0.1",
        secret=SECRET,
        bytes_per_s=250 / 0.05,
        chunk_bytes=250,
    )
    assert get(client_of(server.port, stall_s=1.0), 40 * 250) == DATA[: 40 * 250]
    server.close()


@pytest.mark.parametrize("after", [PAYLOAD_STARTS, PAYLOAD_STARTS + 999, PAYLOAD_STARTS + 5000])
def test_a_flipped_bit_of_the_payload_is_found(server, after):
    with FaultyProxy(server.port) as proxy:
        proxy.faults.append(Fault("flip", after))
        with pytest.raises(TransferError, match="another checksum"):
            get(client_of(proxy.port), len(DATA), slot=len(DATA))


def test_any_flipped_bit_is_an_error(server):
    """Of the nonce, the proof, the size, a chunk's head: whatever the reason given."""
    with FaultyProxy(server.port) as proxy:
        client = client_of(proxy.port, stall_s=0.1)
        for after in range(PAYLOAD_STARTS):
            proxy.faults.append(Fault("flip", after))
            with pytest.raises(TransferError):
                get(client, 30, slot=30)


def test_nobody_listens():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(TransferError, match=rf"127\.0\.0\.1:{port}: Connection refused"):
        get(client_of(port), 8)


def test_a_fetch_is_called_off_from_another_thread(server):
    stop = threading.Event()
    with FaultyProxy(server.port) as proxy:
        proxy.faults.append(Fault("stall", PAYLOAD_STARTS + 10))
        threading.Timer(0.5, stop.set).start()
        with pytest.raises(TransferError, match=r"10 of 30 bytes came.*called off"):
            client_of(proxy.port).fetch(
                1, 0, 30, memoryview(bytearray(30)), deadline=time.monotonic() + 60, stop=stop
            )


def test_closing_cuts_what_is_being_served():
    server = TransferServer(
        lambda *_: memoryview(DATA), host="127.0.0.1", secret=SECRET, bytes_per_s=1, chunk_bytes=1
    )
    client, port = client_of(server.port), server.port
    with ThreadPoolExecutor(3) as pool:
        fetches = [pool.submit(get, client, len(DATA)) for _ in range(3)]
        while serving(server) < 3:
            time.sleep(0.001)
        server.close()
        assert threads_of(server) == []
        assert all(isinstance(f.exception(), TransferError) for f in fetches)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port))


def test_closing_does_not_wait_for_a_peer_that_does_not_read(monkeypatch):
    monkeypatch.setattr(transfer_server, "_TAKE_S", 200.0)
    endless = memoryview(bytes(64 << 20))
    server = TransferServer(lambda *_: endless, host="127.0.0.1", secret=SECRET)
    with socket.create_connection(("127.0.0.1", server.port)) as sock:
        theirs, mine = sock.recv(NONCE_BYTES, socket.MSG_WAITALL), new_nonce()
        sock.sendall(REQUEST.pack(mine, prove(SECRET, FETCH, theirs, mine), 0, 0))
        assert len(sock.recv(ANSWER.size, socket.MSG_WAITALL)) == ANSWER.size
        closing = threading.Thread(target=server.close)
        closing.start()
        closing.join(100.0)
        assert not closing.is_alive()
    assert threads_of(server) == []


@given(
    sizes=st.lists(st.integers(1, 5000), min_size=1, max_size=30),
    pauses=st.lists(st.floats(0, 2), min_size=30, max_size=30),
    rate=st.floats(10, 1e6),
)
def test_no_more_than_the_budget_in_any_span_of_time(sizes, pauses, rate):
    """On a clock of our own. Between two grants lie the bytes of the first, or an idle burst."""

    class Clock:
        now = 100.0

        def monotonic(self) -> float:
            return self.now

        def wait(self, seconds: float) -> bool:
            self.now += seconds
            return False

        def is_set(self) -> bool:
            return False

    clock, burst_s = Clock(), 0.01
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(budget, "time", clock)
        bucket = ByteBudget(rate, burst_s)
        granted = []
        for size, pause in zip(sizes, pauses, strict=False):
            assert bucket.take(size, clock)
            granted.append((clock.now, size))
            clock.now += pause
    for i, (start, _) in enumerate(granted):
        total = 0
        for at, size in granted[i:]:
            # Up to here `total` was granted in [start, at]; the one granted now may still come.
            assert total <= (at - start + burst_s) * rate * (1 + 1e-9) + 1e-6
            total += size


def test_a_budget_that_is_no_rate_is_refused():
    with pytest.raises(ValueError, match="must be > 0 or None, got 0"):
        ByteBudget(0)


def swap(groups: ParallelGroups) -> tuple[int, list[str]]:
    """Every rank fetches from every other; what came and which threads were left."""
    mine = torch.full((5000,), groups.rank, dtype=torch.uint8)
    server, client = connect_transfers(
        groups, lambda layer, slot: memoryview(mine.numpy())[layer:slot], bytes_per_s=None
    )
    good = 0
    for source in range(groups.topology.world_size):
        into = memoryview(bytearray(4000))
        deadline = time.monotonic() + 20
        client.fetch(source, 500, 4500, into, deadline=deadline, stop=NEVER)
        good += bytes(into) == bytes([source]) * 4000
    groups.world.barrier()
    server.close()
    return good, threads_of(server)


@pytest.mark.parametrize(("nodes", "ranks"), [(1, 1), (2, 2)])
def test_ranks_find_each_other(rank_pool, nodes, ranks):
    topology = Topology(num_nodes=nodes, ranks_per_node=ranks)
    assert rank_pool.run(swap, topology) == [(nodes * ranks, [])] * (nodes * ranks)
