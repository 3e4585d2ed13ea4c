"""How a client reaches its server: channel options, TLS, and the tokens that it shows."""

from dataclasses import dataclass, field
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2

from cluster.server.client.error import ClientError
from cluster.server.client.retries import Attempts
from cluster.server.errors import Code
from cluster.server.proto.expertmesh.v1 import inference_pb2 as pb

DEFAULT_TIMEOUT_S = 600.0
DEFAULT_RETRIES = 2
CHANNEL_OPTIONS = [
    ("grpc.max_receive_message_length", -1),
    # Whoever watches must see a server that is back within seconds; the default backs off to minutes.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 2000),
    # A server whose host died says no goodbye: streams end half a minute later.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
]
READY = health_pb2.HealthCheckRequest(service=pb.DESCRIPTOR.services_by_name["Inference"].full_name)

Metadata = tuple[tuple[str, str], ...]


@dataclass(frozen=True, kw_only=True)
class Connection:
    """How to reach the server at `address`, "host:port".

    tls: encrypt, and believe certificates of the authorities in the file ca_file (None: of those that
    the system knows); with any of the three files it is on. cert_file and key_file: who we are, for
    servers that ask (mTLS). token: for every call; admin_token: for those that steer the server, and,
    without a token, for all. timeout_s: of a call with all its attempts, where it is given none of its
    own.
    """

    address: str
    timeout_s: float = DEFAULT_TIMEOUT_S
    token: str | None = field(default=None, repr=False)
    admin_token: str | None = field(default=None, repr=False)
    tls: bool = False
    ca_file: str | Path | None = None
    cert_file: str | Path | None = None
    key_file: str | Path | None = None
    max_retries: int = DEFAULT_RETRIES

    def credentials(self) -> grpc.ChannelCredentials | None:
        """None: plain text. Raises ClientError for files that cannot be read."""
        if (self.cert_file is None) != (self.key_file is None):
            raise ClientError(Code.INVALID_ARGUMENT, "cert_file and key_file go together")
        if not (self.tls or self.ca_file or self.cert_file):
            return None
        return grpc.ssl_channel_credentials(
            _read("ca_file", self.ca_file),
            _read("key_file", self.key_file),
            _read("cert_file", self.cert_file),
        )

    def metadata(self, *, admin: bool = False) -> Metadata:
        token = (self.admin_token if admin else self.token) or self.token or self.admin_token
        return () if token is None else (("authorization", f"Bearer {token}"),)

    def attempts(self, timeout_s: float | None, *, again: bool = True) -> Attempts:
        """again: whether a failed call may be made again."""
        return Attempts(
            self.timeout_s if timeout_s is None else timeout_s, self.max_retries if again else 0
        )


def _read(option: str, path: str | Path | None) -> bytes | None:
    if path is None:
        return None
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ClientError(
            Code.INVALID_ARGUMENT, f"{option} = {str(path)!r}: cannot be read: {error.strerror}"
        ) from None
