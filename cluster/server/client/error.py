"""What every failed call of a client raises."""

from typing import Any, Self

from cluster.server.errors import RequestError
from cluster.server.rpc.status import error_of


class ClientError(RequestError):
    """A call failed; `code` is the gRPC status, `retry_after_s` when to try again, if ever."""

    @classmethod
    def of(cls, call: Any) -> Self:
        """From a failed call: grpc.RpcError or grpc.aio.AioRpcError."""
        error = error_of(call)
        return cls(error.code, error.message, error.retry_after_s)
