"""A client that grants its stream no room at all: what it does not read is bounded, and its own affair.

The gRPC libraries read ahead, so this one speaks HTTP/2 (RFC 9113) by hand.
"""

import socket
import struct

from cluster.server.proto.expertmesh.v1 import inference_pb2 as pb
from tests.server.serving import VOCAB_SIZE, serve
from tests.server.stub_leader import completion

DATA, HEADERS, RST_STREAM, SETTINGS, GOAWAY = 0, 1, 3, 4, 7
END_STREAM, END_HEADERS, ACK = 1, 4, 1
INITIAL_WINDOW_SIZE = 4
MAX_BUFFERED = 16


def http2_frame(kind, flags, stream, payload):
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def header(name, value):
    """HPACK: a literal, neither indexed nor compressed."""
    return b"\0" + b"".join(bytes([len(text)]) + text for text in (name, value))


def call_without_room(connection, method, message):
    """Begin the call and forbid the server to send any data of its answer."""
    headers = (
        (b":method", b"POST"), (b":scheme", b"http"), (b":path", method), (b":authority", b"test"),
        (b"content-type", b"application/grpc"), (b"te", b"trailers"),
    )  # fmt: skip
    data = message.SerializeToString()
    connection.sendall(
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
        + http2_frame(SETTINGS, 0, 0, struct.pack(">HI", INITIAL_WINDOW_SIZE, 0))
        + http2_frame(HEADERS, END_HEADERS, 1, b"".join(header(*pair) for pair in headers))
        + http2_frame(DATA, END_STREAM, 1, struct.pack(">BI", 0, len(data)) + data)
    )


def frames(connection):
    """(kind, flags, stream, payload) of what the server sends."""
    with connection.makefile("rb") as stream:
        while head := stream.read(9):
            length = int.from_bytes(head[:3], "big")
            kind, flags, number = struct.unpack(">BBI", head[3:])
            yield kind, flags, number, stream.read(length)


def test_what_is_not_read_is_bounded_and_others_are_served_meanwhile():
    request = pb.GenerateRequest(
        request_id="slow",
        token_ids=pb.TokenIds(ids=[1, 2]),
        sampling=pb.SamplingParams(max_tokens=120, seed=1, ignore_eos=True),
    )
    with serve(f"server.max_buffered_tokens={MAX_BUFFERED}", step_s=0.01) as serving:
        host, _, port = serving.address.rpartition(":")
        with socket.create_connection((host, int(port)), timeout=20) as connection:
            call_without_room(connection, b"/expertmesh.v1.Inference/GenerateStream", request)
            serving.leaders[0].wait_for("add")
            answer = serving.client.generate([5], seed=3, max_tokens=60)
            assert list(answer.token_ids) == completion([5], 3, VOCAB_SIZE, 60)
            (abort,) = serving.leaders[0].wait_for("abort")
            assert abort["request_id"] == "slow"
            assert serving.num_in_flight() == 0
            seen = [kind for kind, _, number, _ in _until_settled(connection) if number == 1]
            assert DATA not in seen, "it had no room"
        assert serving.client.generate([5], seed=3, max_tokens=5).token_ids


def _until_settled(connection):
    """What has come so far: the server's own settings, its acknowledgement, and of the call headers."""
    connection.settimeout(0.5)
    try:
        yield from frames(connection)
    except TimeoutError:
        return
