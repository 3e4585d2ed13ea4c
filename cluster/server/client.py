"""Clients of a running server, blocking and asyncio, with errors that say what to do.

    with Client("127.0.0.1:50051") as client:
        client.wait_ready(60)
        print(client.generate("Once upon a time", max_tokens=50).text)
        for chunk in client.generate_stream("def fib(n):", temperature=0.0, stop=["\\n\\n"]):
            print(chunk.text, end="")

Prompts are text or token ids. Every failure is a ClientError with a `code`.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar, cast

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cluster.server.errors import Code, RequestError
from cluster.server.proto.expertmesh.v1 import control_pb2, control_pb2_grpc
from cluster.server.proto.expertmesh.v1 import inference_pb2 as pb
from cluster.server.proto.expertmesh.v1 import inference_pb2_grpc as pb_grpc
from cluster.server.status import error_of

if TYPE_CHECKING:
    from cluster.server.proto.expertmesh.v1.control_pb2_grpc import ControlAsyncStub
    from cluster.server.proto.expertmesh.v1.inference_pb2_grpc import InferenceAsyncStub

DEFAULT_TIMEOUT_S = 600.0
_OPTIONS = [
    ("grpc.max_receive_message_length", -1),
    # Whoever watches must see a server that is back within seconds; the default backs off to minutes.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 2000),
]
_READY = health_pb2.HealthCheckRequest(
    service=pb.DESCRIPTOR.services_by_name["Inference"].full_name
)
_RETRY_S = 0.05


_Request = TypeVar("_Request")
_Response = TypeVar("_Response")


class ClientError(RequestError):
    """A call failed; `code` is the gRPC status, `retry_after_s` when to try again, if ever."""

    @classmethod
    def of(cls, call: Any) -> Self:
        """From a failed call: grpc.RpcError or grpc.aio.AioRpcError."""
        error = error_of(call)
        return cls(error.code, error.message, error.retry_after_s)


def build_request(
    prompt: str | Sequence[int],
    *,
    model: str | None = None,
    request_id: str | None = None,
    data_parallel_rank: int | None = None,
    **sampling: Any,
) -> pb.GenerateRequest:
    """The message for a prompt and the fields of `SamplingParams` in inference.proto.

    Raises ClientError (INVALID_ARGUMENT) for what cannot even be written into the message.
    """
    try:
        if isinstance(sampling.get("stop"), str):
            sampling["stop"] = [sampling["stop"]]
        request = pb.GenerateRequest(
            model=model,
            request_id=request_id,
            data_parallel_rank=data_parallel_rank,
            sampling=pb.SamplingParams(**sampling),
        )
        if isinstance(prompt, str):
            request.text = prompt
        else:
            request.token_ids.CopyFrom(pb.TokenIds(ids=prompt))
    except (TypeError, ValueError) as error:
        known = ", ".join(field.name for field in pb.SamplingParams.DESCRIPTOR.fields)
        raise ClientError(
            Code.INVALID_ARGUMENT,
            f"{error} (a request is a prompt of text or token ids, with parameters among {known})",
        ) from None
    return request


class Client:
    """Blocking client; threads may share one.

    timeout_s: of every call that is given none of its own. admin_token: for rebalance and
    dump_expert_stats, where the server has one.
    """

    def __init__(
        self,
        address: str,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        *,
        admin_token: str | None = None,
    ) -> None:
        self.address = address
        self._timeout_s = timeout_s
        self._metadata = (
            () if admin_token is None else (("authorization", f"Bearer {admin_token}"),)
        )
        self._channel = grpc.insecure_channel(address, options=_OPTIONS)
        self._inference = pb_grpc.InferenceStub(self._channel)
        self._control = control_pb2_grpc.ControlStub(self._channel)
        self._health = health_pb2_grpc.HealthStub(self._channel)

    def generate(self, prompt: str | Sequence[int], **options: Any) -> pb.GenerateResponse:
        """The whole completion; options are those of `build_request`."""
        request = build_request(prompt, **options)
        return self._call(self._inference.Generate, request)

    def generate_stream(
        self, prompt: str | Sequence[int], **options: Any
    ) -> Iterator[pb.GenerateChunk]:
        """Chunks as they come; closing the iterator early stops the generation."""
        request = build_request(prompt, **options)
        call = self._inference.GenerateStream(request, timeout=self._timeout_s)
        try:
            yield from call
        except grpc.RpcError as error:
            raise ClientError.of(error) from None
        finally:
            call.cancel()

    def tokenize(self, text: str, add_special_tokens: bool = True) -> list[int]:
        request = pb.TokenizeRequest(text=text, add_special_tokens=add_special_tokens)
        return list(self._call(self._inference.Tokenize, request).token_ids)

    def server_info(self) -> control_pb2.GetServerInfoResponse:
        return self._call(self._control.GetServerInfo, control_pb2.GetServerInfoRequest())

    def model_info(self) -> control_pb2.GetModelInfoResponse:
        return self._call(self._control.GetModelInfo, control_pb2.GetModelInfoRequest())

    def loads(self) -> control_pb2.GetLoadsResponse:
        return self._call(self._control.GetLoads, control_pb2.GetLoadsRequest())

    def placement(self) -> control_pb2.GetExpertPlacementResponse:
        request = control_pb2.GetExpertPlacementRequest()
        return self._call(self._control.GetExpertPlacement, request)

    def balance(self) -> control_pb2.GetBalanceResponse:
        return self._call(self._control.GetBalance, control_pb2.GetBalanceRequest())

    def rebalance(
        self,
        *,
        dry_run: bool = False,
        target: float | None = None,
        from_scratch: bool = False,
        timeout_s: float | None = None,
    ) -> control_pb2.RebalanceResponse:
        """Plan for the load recorded so far and, unless `dry_run`, start to move experts."""
        request = control_pb2.RebalanceRequest(
            dry_run=dry_run, target=target, from_scratch=from_scratch
        )
        return self._call(self._control.Rebalance, request, timeout_s)

    def dump_expert_stats(self) -> bytes:
        """The recorded load of the experts as an .npz file."""
        call = self._control.DumpExpertStats(
            control_pb2.DumpExpertStatsRequest(),
            timeout=self._timeout_s,
            metadata=self._metadata,
        )
        try:
            return b"".join(chunk.data for chunk in call)
        except grpc.RpcError as error:
            raise ClientError.of(error) from None

    def wait_ready(self, timeout_s: float) -> None:
        """Return once the server takes requests; TimeoutError says what it did instead."""
        deadline = time.monotonic() + timeout_s
        seen = "no answer"
        while (left_s := deadline - time.monotonic()) > 0:
            try:
                for answer in self._health.Watch(_READY, timeout=left_s):
                    if answer.status == health_pb2.HealthCheckResponse.SERVING:
                        return
                    seen = "the server answers but is not ready"
            except grpc.RpcError as error:
                seen = _seen(error, seen)
                time.sleep(min(_RETRY_S, max(0.0, deadline - time.monotonic())))
        raise TimeoutError(f"{self.address} was not ready within {timeout_s:g} s: {seen}")

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


class AsyncClient:
    """The same for asyncio; make it inside the loop that uses it."""

    def __init__(self, address: str, timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
        self._timeout_s = timeout_s
        self._channel = grpc.aio.insecure_channel(address, options=_OPTIONS)
        self._address = address
        self._inference = cast("InferenceAsyncStub", pb_grpc.InferenceStub(self._channel))
        self._control = cast("ControlAsyncStub", control_pb2_grpc.ControlStub(self._channel))
        self._health = health_pb2_grpc.HealthStub(self._channel)

    async def generate(self, prompt: str | Sequence[int], **options: Any) -> pb.GenerateResponse:
        """The whole completion; options are those of `build_request`."""
        return await self._call(self._inference.Generate, build_request(prompt, **options))

    async def generate_stream(
        self, prompt: str | Sequence[int], **options: Any
    ) -> AsyncIterator[pb.GenerateChunk]:
        """Chunks as they come; closing the iterator early stops the generation."""
        request = build_request(prompt, **options)
        call = self._inference.GenerateStream(request, timeout=self._timeout_s)
        try:
            async for chunk in call:
                yield chunk
        except grpc.aio.AioRpcError as error:
            raise ClientError.of(error) from None
        finally:
            call.cancel()

    async def tokenize(self, text: str, add_special_tokens: bool = True) -> list[int]:
        request = pb.TokenizeRequest(text=text, add_special_tokens=add_special_tokens)
        return list((await self._call(self._inference.Tokenize, request)).token_ids)

    async def server_info(self) -> control_pb2.GetServerInfoResponse:
        return await self._call(self._control.GetServerInfo, control_pb2.GetServerInfoRequest())

    async def wait_ready(self, timeout_s: float) -> None:
        """Return once the server takes requests; TimeoutError says what it did instead."""
        deadline = time.monotonic() + timeout_s
        seen = "no answer"
        while (left_s := deadline - time.monotonic()) > 0:
            try:
                async for answer in self._health.Watch(_READY, timeout=left_s):
                    if answer.status == health_pb2.HealthCheckResponse.SERVING:
                        return
                    seen = "the server answers but is not ready"
            except grpc.aio.AioRpcError as error:
                seen = _seen(error, seen)
                await asyncio.sleep(min(_RETRY_S, max(0.0, deadline - time.monotonic())))
        raise TimeoutError(f"{self._address} was not ready within {timeout_s:g} s: {seen}")

    async def _call(
        self, method: "grpc.aio.UnaryUnaryMultiCallable[_Request, _Response]", request: _Request
    ) -> _Response:
        try:
            return await method(request, timeout=self._timeout_s)
        except grpc.aio.AioRpcError as error:
            raise ClientError.of(error) from None

    async def close(self) -> None:
        await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()


def _seen(error: Any, before: str) -> str:
    """What a failed watch tells; running out of time tells nothing new."""
    if error.code() == grpc.StatusCode.DEADLINE_EXCEEDED:
        return before
    return str(ClientError.of(error))
