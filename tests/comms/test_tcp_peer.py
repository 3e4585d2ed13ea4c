"""One connection: frames cut anywhere on their way make the same messages, and no wake is missed."""

import select
import socket
from contextlib import closing

import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from comms.tcp_peer import Inbox, Peer

SIZES = st.sampled_from([0, 1, 100, 8191, 8192, 16_384, 20_000, 300_000, 700_000])


def connection() -> tuple[socket.socket, socket.socket]:
    """A real TCP connection on loopback, both ends non-blocking."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = socket.create_connection(listener.getsockname())
        far, _ = listener.accept()
    for sock in (near, far):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setblocking(False)
    return near, far


def on_the_wire(messages: list[list[int]]) -> tuple[bytes, list[bytes]]:
    """What a Peer sends for messages of such frames, read from a socket; and the messages."""
    near, far = connection()
    stream, contents = bytearray(), []
    with closing(near), closing(far):
        peer = Peer(near, rank=1, my_rank=0)
        for call, frames in enumerate(messages):
            payloads = [(torch.arange(n) * (3 + call + k)).to(torch.uint8)
                        for k, n in enumerate(frames)]  # fmt: skip
            contents.append(b"".join(bytes(payload.numpy()) for payload in payloads))
            for k, payload in enumerate(payloads):
                peer.send(call, b"dispatch", payload, last=k + 1 == len(payloads))
        while peer.unsent or len(stream) < peer.sent:
            peer.flush()
            if select.select([far], [], [], 5.0 if not peer.unsent else 0.01)[0]:
                stream += far.recv(1 << 20)
    return bytes(stream), contents


@settings(max_examples=40, deadline=None)
@given(
    messages=st.lists(st.lists(SIZES, min_size=1, max_size=3), min_size=1, max_size=3),
    cuts=st.lists(st.floats(0, 1), max_size=6),
    near_end=st.integers(1, 300),
    ahead=st.integers(0, 2),
    known=st.booleans(),
)
@example(messages=[[700_000]], cuts=[0.5], near_end=100, ahead=0, known=True)
@example(messages=[[100]], cuts=[], near_end=300, ahead=1, known=False)
def test_frames_may_be_cut_anywhere(messages, cuts, near_end, ahead, known) -> None:
    """The last bytes come alone, after the kernel was asked to wake us for many."""
    stream, contents = on_the_wire(messages)
    ends = sorted({int(cut * len(stream)) for cut in cuts} | {max(0, len(stream) - near_end)})
    near, far = connection()
    with closing(near), closing(far):
        peer = Peer(near, rank=1, my_rank=0)
        inboxes = [
            Inbox(call, b"dispatch", torch.empty(len(data), dtype=torch.uint8) if known else None)
            for call, data in enumerate(contents)
        ]
        waiting = list(inboxes)
        for lo, hi in zip([0, *ends], [*ends, len(stream)], strict=True):
            sent, piece = 0, memoryview(stream)[lo:hi]
            while sent < len(piece) or select.select([near], [], [], 0.002)[0]:
                while sent < len(piece) and select.select([], [far], [], 0.002)[1]:
                    sent += far.send(piece[sent:])
                if select.select([near], [], [], 0)[0] and not peer.receive():
                    if not waiting:
                        break
                    peer.expect(waiting.pop(0))  # only now does an operation ask for it
            while len(waiting) > ahead:
                peer.expect(waiting.pop(0))
        while waiting:
            peer.expect(waiting.pop(0))
        while select.select([near], [], [], 0.01)[0]:
            peer.receive()
        assert peer.fault is None
        for inbox, data in zip(inboxes, contents, strict=True):
            assert inbox.done
            assert b"".join(bytes(part.numpy()) for part in inbox.parts) == data
            assert (inbox.received, inbox.expected) == (len(data), len(data))


def test_the_last_words_of_a_peer_are_read_even_when_sending_fails() -> None:
    near, far = connection()
    with closing(near):
        peer, other = Peer(near, rank=1, my_rank=0), Peer(far, rank=0, my_rank=1)
        peer.send(1, b"x", torch.ones(10, dtype=torch.uint8), last=True)
        select.select([far], [], [], 5.0)
        other.send_abort("rank 1 gave up")
        select.select([near], [], [], 5.0)
        far.close()  # with our bytes unread: the connection is reset
        for _ in range(3):
            peer.send(2, b"x", torch.ones(10, dtype=torch.uint8), last=True)
    assert peer.aborted
    assert peer.fault == "rank 1 gave up"
