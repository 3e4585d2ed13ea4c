"""The calls of service Control that terminal commands make, and what becomes of their failures.

Exit codes of these commands: 0 done or nothing to do; 1 the server refused or failed; 2 options
that cannot be, a token that is missing or wrong, or no server that answers.
"""

import sys
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import grpc

from cluster.server.client import ClientError
from cluster.server.errors import Code
from cluster.server.proto.expertmesh.v1 import control_pb2 as pb
from cluster.server.proto.expertmesh.v1 import control_pb2_grpc as pb_grpc

_OPTIONS = [
    ("grpc.max_receive_message_length", -1),
    # A viewer must see a server that is back within seconds; the default backs off to minutes.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 2000),
]
_NO_ANSWER = {Code.UNAVAILABLE, Code.DEADLINE_EXCEEDED}
_USAGE = {
    Code.INVALID_ARGUMENT,
    Code.UNAUTHENTICATED,
    Code.PERMISSION_DENIED,
    Code.UNIMPLEMENTED,
}

_Request = TypeVar("_Request")
_Response = TypeVar("_Response")


class ControlCalls:
    """One connection; every call ends within `timeout_s` and fails with a ClientError."""

    def __init__(self, endpoint: str, *, timeout_s: float = 10.0, token: str | None = None) -> None:
        self.endpoint = endpoint
        self._timeout_s = timeout_s
        self._metadata = () if token is None else (("authorization", f"Bearer {token}"),)
        self._channel = grpc.insecure_channel(endpoint, options=_OPTIONS)
        self._stub = pb_grpc.ControlStub(self._channel)

    def server_info(self) -> pb.GetServerInfoResponse:
        return self._call(self._stub.GetServerInfo, pb.GetServerInfoRequest())

    def loads(self) -> pb.GetLoadsResponse:
        return self._call(self._stub.GetLoads, pb.GetLoadsRequest())

    def placement(self) -> pb.GetExpertPlacementResponse:
        return self._call(self._stub.GetExpertPlacement, pb.GetExpertPlacementRequest())

    def balance(self) -> pb.GetBalanceResponse:
        return self._call(self._stub.GetBalance, pb.GetBalanceRequest())

    def rebalance(self, request: pb.RebalanceRequest, timeout_s: float) -> pb.RebalanceResponse:
        return self._call(self._stub.Rebalance, request, timeout_s)

    def _call(
        self,
        method: "grpc.UnaryUnaryMultiCallable[_Request, _Response]",
        request: _Request,
        timeout_s: float | None = None,
    ) -> _Response:
        try:
            return method(request, timeout=timeout_s or self._timeout_s, metadata=self._metadata)
        except grpc.RpcError as error:
            raise ClientError.of(error) from None

    def close(self) -> None:
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def read_token(path: Path | None) -> str | None:
    """The admin token in a file; raises ValueError, which names the file, if there is none."""
    if path is None:
        return None
    try:
        token = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--admin-token-file {path}: cannot be read: {error}") from None
    if not token or not token.isascii() or not token.isprintable():
        raise ValueError(f"--admin-token-file {path}: holds no token of printable ASCII characters")
    return token


def report(endpoint: str, error: ClientError) -> int:
    """Say why a call failed, and what to do; returns the exit code."""
    advice: dict[Any, str] = {
        Code.UNAVAILABLE: "no server there? `--endpoint` names another",
        Code.DEADLINE_EXCEEDED: "connected, but the server does not answer",
        Code.UNAUTHENTICATED: "`--admin-token-file` names the file with the server's token",
        Code.UNIMPLEMENTED: "the server is older than this command",
    }
    hint = f" ({advice[error.code]})" if error.code in advice else ""
    print(f"{endpoint}: {error}{hint}", file=sys.stderr)
    return 2 if error.code in _NO_ANSWER | _USAGE else 1
