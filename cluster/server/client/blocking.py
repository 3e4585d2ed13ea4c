"""The blocking client."""

import time
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cluster.server.client.connection import CHANNEL_OPTIONS, READY, Connection
from cluster.server.client.error import ClientError
from cluster.server.client.ready import RETRY_S, Watched
from cluster.server.client.requests import Prompt, build_request, build_tokenize
from cluster.server.proto.expertmesh.v1 import control_pb2 as control
from cluster.server.proto.expertmesh.v1 import control_pb2_grpc
from cluster.server.proto.expertmesh.v1 import inference_pb2 as pb
from cluster.server.proto.expertmesh.v1 import inference_pb2_grpc as pb_grpc

if TYPE_CHECKING:
    from grpc import UnaryStreamMultiCallable, UnaryUnaryMultiCallable

_Request = TypeVar("_Request")
_Response = TypeVar("_Response")


class Client:
    """Threads may share one. See `Connection` for what it may be given beside the address."""

    def __init__(self, address: str, timeout_s: float | None = None, **connection: Any) -> None:
        if timeout_s is not None:
            connection["timeout_s"] = timeout_s
        self.connection = Connection(address=address, **connection)
        credentials = self.connection.credentials()
        self._channel = (
            grpc.insecure_channel(address, options=CHANNEL_OPTIONS)
            if credentials is None
            else grpc.secure_channel(address, credentials, options=CHANNEL_OPTIONS)
        )
        self._inference = pb_grpc.InferenceStub(self._channel)
        self._control = control_pb2_grpc.ControlStub(self._channel)
        self._health = health_pb2_grpc.HealthStub(self._channel)

    @property
    def address(self) -> str:
        return self.connection.address

    # Generation ---------------------------------------------------------------------------------

    def generate(
        self, prompt: Prompt, *, timeout_s: float | None = None, **options: Any
    ) -> pb.GenerateResponse:
        """The whole completion; options are those of `build_request`."""
        return self._call(self._inference.Generate, build_request(prompt, **options), timeout_s)

    def generate_stream(
        self, prompt: Prompt, *, timeout_s: float | None = None, **options: Any
    ) -> Iterator[pb.GenerateChunk]:
        """Chunks as they come; closing the iterator early stops the generation."""
        request = build_request(prompt, **options)
        attempts = self.connection.attempts(timeout_s)
        while True:
            call = self._inference.GenerateStream(
                request, timeout=attempts.left_s, metadata=self.connection.metadata()
            )
            begun = False
            try:
                for chunk in call:
                    begun = True
                    yield chunk
                return
            except grpc.RpcError as error:
                failed = ClientError.of(error)
            finally:
                call.cancel()
            if begun:
                raise failed
            time.sleep(attempts.pause_after(failed))

    def tokenize(self, text: str | Sequence[Any], **options: Any) -> list[int]:
        """Of a text or of messages; options are those of `build_tokenize`."""
        return list(self._call(self._inference.Tokenize, build_tokenize(text, **options)).token_ids)

    # What runs there ----------------------------------------------------------------------------

    def server_info(self) -> control.GetServerInfoResponse:
        return self._call(self._control.GetServerInfo, control.GetServerInfoRequest())

    def model_info(self) -> control.GetModelInfoResponse:
        return self._call(self._control.GetModelInfo, control.GetModelInfoRequest())

    def loads(self) -> control.GetLoadsResponse:
        return self._call(self._control.GetLoads, control.GetLoadsRequest())

    def placement(self) -> control.GetExpertPlacementResponse:
        return self._call(self._control.GetExpertPlacement, control.GetExpertPlacementRequest())

    def balance(self) -> control.GetBalanceResponse:
        return self._call(self._control.GetBalance, control.GetBalanceRequest())

    def wait_ready(self, timeout_s: float) -> None:
        """Return once the server takes requests; TimeoutError says what it did instead."""
        watched = Watched(self.address, timeout_s)
        while watched.left_s > 0:
            try:
                for answer in self._health.Watch(READY, timeout=watched.left_s):
                    if answer.status == health_pb2.HealthCheckResponse.SERVING:
                        return
                    watched.not_ready()
            except grpc.RpcError as error:
                watched.failed(error)
                time.sleep(min(RETRY_S, watched.left_s))
        raise watched.timeout()

    # For admins ---------------------------------------------------------------------------------

    def rebalance(
        self,
        *,
        dry_run: bool = False,
        target: float | None = None,
        from_scratch: bool = False,
        timeout_s: float | None = None,
    ) -> control.RebalanceResponse:
        """Plan for the load recorded so far and, unless `dry_run`, start to move experts."""
        request = control.RebalanceRequest(
            dry_run=dry_run, target=target, from_scratch=from_scratch
        )
        return self._steer(self._control.Rebalance, request, timeout_s)

    def abort(self, request_id: str) -> bool:
        """End one request; False if it is not in flight."""
        return self._steer(self._control.Abort, control.AbortRequest(request_id=request_id)).aborted

    def drain(self, timeout_s: float | None = None) -> int:
        """Have the server take no more requests; returns how many in flight had to be cut off."""
        request = control.DrainRequest(timeout_s=timeout_s)
        return self._steer(self._control.Drain, request).num_cut_off

    def flush_cache(self) -> int:
        """Forget cached prompts that no request uses; returns how many replicas were told."""
        return self._steer(self._control.FlushCache, control.FlushCacheRequest()).num_replicas

    def dump_expert_stats(self) -> bytes:
        """The recorded load of the experts as an .npz file."""
        return self._collect(self._control.DumpExpertStats, control.DumpExpertStatsRequest())

    def trace_steps(self, num_steps: int | None = None, timeout_s: float | None = None) -> bytes:
        """What every rank does in the next steps, as JSON for Perfetto; waits so long for them."""
        request = control.TraceStepsRequest(num_steps=num_steps, timeout_s=timeout_s)
        return self._collect(self._control.TraceSteps, request)

    # How calls are made -------------------------------------------------------------------------

    def _call(
        self,
        method: "UnaryUnaryMultiCallable[_Request, _Response]",
        request: _Request,
        timeout_s: float | None = None,
    ) -> _Response:
        attempts = self.connection.attempts(timeout_s)
        while True:
            try:
                return method(request, timeout=attempts.left_s, metadata=self.connection.metadata())
            except grpc.RpcError as error:
                failed = ClientError.of(error)
            time.sleep(attempts.pause_after(failed))

    def _steer(
        self,
        method: "UnaryUnaryMultiCallable[_Request, _Response]",
        request: _Request,
        timeout_s: float | None = None,
    ) -> _Response:
        """Once: what has been done must not be done again because the answer was lost."""
        left_s = self.connection.attempts(timeout_s).left_s
        try:
            return method(request, timeout=left_s, metadata=self.connection.metadata(admin=True))
        except grpc.RpcError as error:
            raise ClientError.of(error) from None

    def _collect(
        self, method: "UnaryStreamMultiCallable[_Request, Any]", request: _Request
    ) -> bytes:
        """The data of all chunks of an answer to an admin."""
        metadata = self.connection.metadata(admin=True)
        try:
            call = method(request, timeout=self.connection.timeout_s, metadata=metadata)
            return b"".join(chunk.data for chunk in call)
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
