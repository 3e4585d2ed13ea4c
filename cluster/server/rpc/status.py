"""How a RequestError becomes a gRPC status, and a gRPC status a RequestError again."""

import asyncio
import logging
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, NoReturn

import grpc
import grpc.aio
from google.protobuf import duration_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from cluster.server.errors import Code, RequestError

_MAX_MESSAGE_CHARS = 2000

logger = logging.getLogger(__name__)


@asynccontextmanager
async def statuses(context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[None]:
    """Whatever goes wrong inside ends this one call with a status."""
    try:
        yield
    except RequestError as error:
        await abort_with(context, error)
    except (grpc.aio.AbortError, asyncio.CancelledError):
        raise
    except Exception:
        logger.exception("a call failed for a reason that is our own")
        await abort_with(context, RequestError(Code.INTERNAL, "internal error; see server log"))


async def abort_with(context: grpc.aio.ServicerContext[Any, Any], error: RequestError) -> NoReturn:
    """End the call with the error's code and, where it may be retried, RetryInfo."""
    code = grpc.StatusCode[error.code]
    status = status_pb2.Status(code=code.value[0], message=error.message[:_MAX_MESSAGE_CHARS])
    trailer = ()
    if error.retry_after_s is not None:
        fraction, seconds = math.modf(error.retry_after_s)
        delay = duration_pb2.Duration(seconds=int(seconds), nanos=int(fraction * 1e9))
        status.details.add().Pack(error_details_pb2.RetryInfo(retry_delay=delay))
        trailer = rpc_status.to_status(status).trailing_metadata
    try:
        await context.abort(code, status.message, trailer)
    except grpc.aio.InternalError as gone:
        # The connection broke a moment ago, so there is nobody to tell; gRPC has not noticed yet, and
        # would log this as an error of ours.
        raise asyncio.CancelledError from gone


def error_of(call: Any) -> RequestError:
    """The RequestError behind a failed call (grpc.RpcError or grpc.aio.AioRpcError)."""
    retry_after_s = None
    for key, value in call.trailing_metadata() or ():
        if key == "grpc-status-details-bin":
            for detail in status_pb2.Status.FromString(value).details:
                info = error_details_pb2.RetryInfo()
                if detail.Unpack(info):
                    retry_after_s = info.retry_delay.seconds + info.retry_delay.nanos / 1e9
    return RequestError(Code(call.code().name), call.details() or "", retry_after_s)
