"""The gRPC face of operation: what runs here and how loaded it is; steering for admins."""

import math
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from importlib import metadata
from typing import Any

import grpc.aio

from cluster.rebalancer import Rebalancer
from cluster.server.errors import Code, RequestError, invalid
from cluster.server.gateway import Gateway
from cluster.server.proto.expertmesh.v1 import control_pb2 as pb
from cluster.server.proto.expertmesh.v1 import control_pb2_grpc as pb_grpc
from cluster.server.rpc.access import authorization, peer_is_loopback
from cluster.server.rpc.balance import balance_message, outcome_message, placement_message
from cluster.server.rpc.status import statuses
from cluster.server.security import EVERYBODY, Credentials

SERVICE_NAME: str = pb.DESCRIPTOR.services_by_name["Control"].full_name
_MAX_DRAIN_S = 86_400.0
_CHUNK_BYTES = 1 << 20

_Context = grpc.aio.ServicerContext[Any, Any]
TraceSteps = Callable[[int | None, float | None], AsyncIterator[bytes]]
"""Records so many steps of all ranks within so many seconds (None: its defaults): a file in pieces. Raises
RequestError."""


class ControlServicer(pb_grpc.ControlServicer):
    """Reads are open; what changes or costs needs the admin token or, without one, loopback."""

    def __init__(
        self,
        gateway: Gateway,
        rebalancer: Rebalancer | None = None,
        credentials: Credentials = EVERYBODY,
        trace_steps: TraceSteps | None = None,
    ) -> None:
        self._gateway = gateway
        self._balance = rebalancer
        self._started = time.monotonic()
        self._credentials = credentials
        self._trace_steps = trace_steps

    async def GetServerInfo(
        self, request: pb.GetServerInfoRequest, context: _Context
    ) -> pb.GetServerInfoResponse:
        parallel = self._gateway.config.parallel
        return pb.GetServerInfoResponse(
            version=_version(),
            model=self._gateway.model.name,
            ready=self._gateway.readiness.ready,
            draining=self._gateway.draining,
            num_nodes=parallel.num_nodes,
            ranks_per_node=parallel.ranks_per_node,
            tensor_parallel_size=parallel.tp_size,
            num_replicas=parallel.num_replicas,
            uptime_s=time.monotonic() - self._started,
            rebalancing=self._balance.state if self._balance else "off: no rank can be asked",
            presets=self._gateway.presets,
        )

    async def GetModelInfo(
        self, request: pb.GetModelInfoRequest, context: _Context
    ) -> pb.GetModelInfoResponse:
        model = self._gateway.model
        return pb.GetModelInfoResponse(
            model=model.name,
            architecture=model.architecture,
            dtype=model.dtype,
            vocab_size=model.vocab_size,
            max_model_len=model.max_model_len,
            eos_token_ids=model.eos_token_ids,
            has_tokenizer=self._gateway.tokenizer is not None,
        )

    async def GetLoads(self, request: pb.GetLoadsRequest, context: _Context) -> pb.GetLoadsResponse:
        now = time.monotonic()
        return pb.GetLoadsResponse(
            replicas=[
                pb.ReplicaLoad(
                    replica=replica.idx,
                    in_flight=replica.in_flight,
                    running=replica.stats.running,
                    waiting=replica.stats.waiting,
                    kv_usage=replica.stats.kv_usage,
                    step=replica.stats.step,
                    last_heard_s=now - replica.last_heard,
                    kv_blocks_used=replica.stats.kv_blocks_used,
                    kv_blocks_cached=replica.stats.kv_blocks_cached,
                    kv_blocks_total=replica.stats.kv_blocks_total,
                    preemptions=replica.stats.preemptions,
                    prefix_queries=replica.stats.prefix_queries,
                    prefix_hits=replica.stats.prefix_hits,
                )
                for replica in self._gateway.replicas
            ]
        )

    async def Abort(self, request: pb.AbortRequest, context: _Context) -> pb.AbortResponse:
        async with self._admin(context):
            aborted = self._gateway.abort(request.request_id)
        return pb.AbortResponse(aborted=aborted)

    async def Drain(self, request: pb.DrainRequest, context: _Context) -> pb.DrainResponse:
        async with self._admin(context):
            timeout_s = request.timeout_s if request.HasField("timeout_s") else None
            if timeout_s is not None and not 0 <= timeout_s <= _MAX_DRAIN_S:
                raise invalid("timeout_s", timeout_s, f"in [0, {_MAX_DRAIN_S:g}]")
            num_cut_off = await self._gateway.drain(timeout_s)
        return pb.DrainResponse(num_cut_off=num_cut_off)

    async def GetExpertPlacement(
        self, request: pb.GetExpertPlacementRequest, context: _Context
    ) -> pb.GetExpertPlacementResponse:
        async with statuses(context):
            return placement_message(self._rebalancer)

    async def GetBalance(
        self, request: pb.GetBalanceRequest, context: _Context
    ) -> pb.GetBalanceResponse:
        async with statuses(context):
            return await balance_message(self._rebalancer)

    async def Rebalance(
        self, request: pb.RebalanceRequest, context: _Context
    ) -> pb.RebalanceResponse:
        async with self._admin(context):
            target = request.target if request.HasField("target") else None
            if target is not None and not 1 <= target < math.inf:
                raise invalid("target", target, "max / mean over ranks, so at least 1")
            outcome = await self._rebalancer.rebalance(
                dry_run=request.dry_run, target=target, from_scratch=request.from_scratch
            )
            return outcome_message(outcome, self._rebalancer)

    async def DumpExpertStats(
        self, request: pb.DumpExpertStatsRequest, context: _Context
    ) -> AsyncIterator[pb.DumpExpertStatsChunk]:
        async with self._admin(context):
            data = self._rebalancer.loads.dump()
            for start in range(0, len(data), _CHUNK_BYTES):
                yield pb.DumpExpertStatsChunk(data=data[start : start + _CHUNK_BYTES])

    async def FlushCache(
        self, request: pb.FlushCacheRequest, context: _Context
    ) -> pb.FlushCacheResponse:
        async with self._admin(context):
            return pb.FlushCacheResponse(num_replicas=self._gateway.flush_cache())

    async def TraceSteps(
        self, request: pb.TraceStepsRequest, context: _Context
    ) -> AsyncIterator[pb.TraceStepsChunk]:
        async with self._admin(context):
            if self._trace_steps is None:
                raise RequestError(
                    Code.FAILED_PRECONDITION, "this server has no ranks to ask about their steps"
                )
            num_steps = request.num_steps if request.HasField("num_steps") else None
            timeout_s = request.timeout_s if request.HasField("timeout_s") else None
            async for piece in self._trace_steps(num_steps, timeout_s):
                yield pb.TraceStepsChunk(data=piece)

    @property
    def _rebalancer(self) -> Rebalancer:
        if self._balance is None:
            raise RequestError(
                Code.FAILED_PRECONDITION, "this server has no ranks to ask about their experts"
            )
        return self._balance

    @asynccontextmanager
    async def _admin(self, context: _Context) -> AsyncIterator[None]:
        async with statuses(context):
            self._check_admin(context)
            yield

    def _check_admin(self, context: _Context) -> None:
        self._credentials.check_admin(authorization(context), peer_is_loopback(context.peer()))


def _version() -> str:
    try:
        return metadata.version("expertmesh")
    except metadata.PackageNotFoundError:
        return "unknown"
