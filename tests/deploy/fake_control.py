"""Service Control without a cluster: answers that a test sets, over a real socket."""

import threading
import time
from collections.abc import Iterator, Sequence
from concurrent import futures
from contextlib import contextmanager
from typing import Any

import grpc
import numpy as np

from cluster.server.proto.expertmesh.v1 import control_pb2 as pb
from cluster.server.proto.expertmesh.v1 import control_pb2_grpc as pb_grpc
from router.placement import Placement


class FakeControl(pb_grpc.ControlServicer):
    """Its attributes are its answers. Once `Rebalance` has started something, each further look at
    the balance goes one entry on in `doings`; after the last it has `finished`, or `abandoned`.
    """

    def __init__(self) -> None:
        self.info = server_info()
        self.balance = balance(np.ones((4, 5)))
        self.loads = loads(2)
        self.placement = placement_message(Placement.contiguous(5, 32, 4, 8, ranks_per_node=2))
        self.plan = pb.RebalanceResponse()
        self.refusal: tuple[grpc.StatusCode, str] | None = None
        self.token: str | None = None
        self.doings = [
            "layer 1 (1 of 2), experts to move: 3",
            "layer 4 (2 of 2), experts to move: 1",
        ]
        self.abandons = ""
        self.requests: list[pb.RebalanceRequest] = []
        self._left: list[str] | None = None
        self._lock = threading.Lock()

    def GetServerInfo(self, request: Any, context: Any) -> pb.GetServerInfoResponse:
        return self.info

    def GetLoads(self, request: Any, context: Any) -> pb.GetLoadsResponse:
        return self.loads

    def GetExpertPlacement(self, request: Any, context: Any) -> pb.GetExpertPlacementResponse:
        return self.placement

    def GetBalance(self, request: Any, context: Any) -> pb.GetBalanceResponse:
        with self._lock:
            if self._left is not None:
                self._go_on(self.balance.rebalances)
            return self.balance

    def _go_on(self, stats: pb.RebalanceStats) -> None:
        assert self._left is not None
        if self._left:
            stats.doing = self._left.pop(0)
            return
        self._left = None
        stats.running, stats.doing = False, ""
        stats.seconds += 1.5
        if self.abandons:
            stats.abandoned += 1
            stats.moves += 1
            stats.last_error = self.abandons
        else:
            stats.finished += 1
            stats.moves += sum(layer.moves for layer in self.plan.layers)

    def Rebalance(self, request: pb.RebalanceRequest, context: Any) -> pb.RebalanceResponse:
        sent = dict(context.invocation_metadata()).get("authorization")
        if self.token is not None and sent != f"Bearer {self.token}":
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "the admin token is required")
        if self.refusal is not None:
            context.abort(*self.refusal)
        with self._lock:
            self.requests.append(request)
            if self.plan.started:
                self._left = list(self.doings)
                self.balance.rebalances.started += 1
                self.balance.rebalances.running = True
            return self.plan


@contextmanager
def serving(control: FakeControl, port: int = 0) -> Iterator[str]:
    """The endpoint; nothing answers there any more afterwards."""
    server = grpc.server(
        futures.ThreadPoolExecutor(4, "fake-control"), options=[("grpc.so_reuseport", 0)]
    )
    pb_grpc.add_ControlServicer_to_server(control, server)
    bound = server.add_insecure_port(f"127.0.0.1:{port}")
    server.start()
    try:
        yield f"127.0.0.1:{bound}"
    finally:
        server.stop(0).wait()


def server_info(nodes: int = 2, ranks_per_node: int = 2) -> pb.GetServerInfoResponse:
    return pb.GetServerInfoResponse(
        model="mosaic",
        ready=True,
        num_nodes=nodes,
        ranks_per_node=ranks_per_node,
        tensor_parallel_size=2,
        num_replicas=nodes,
    )


def balance(
    served_RL: Any, ranks_per_node: int = 2, first_layer: int = 1, **fields: Any
) -> pb.GetBalanceResponse:
    """What a cluster says whose ranks served these pairs in ten seconds."""
    served = np.asarray(served_RL, dtype=np.int64)
    busiest = served.max(axis=0, initial=0)
    even = served.sum(axis=0) / np.maximum(1, busiest) / max(1, len(served))
    busy = even[even > 0]
    summary = (busy.mean(), busy.min(), np.median(busy)) if len(busy) else (0.0, 0.0, 0.0)
    return pb.GetBalanceResponse(
        epoch=fields.pop("epoch", 7),
        window_s=10,
        ranks=[
            pb.RankBalance(
                rank=rank,
                node=rank // ranks_per_node,
                served=row.tolist(),
                served_total=int(row.sum()),
                intra_node_bytes_per_s=3 * 2**20,
                inter_node_bytes_per_s=2**19,
                step_ms=8.25,
            )
            for rank, row in enumerate(served)
        ],
        layers=[
            pb.LayerBalance(layer=first_layer + i, balancedness=value, planned=0.98)
            for i, value in enumerate(even)
        ],
        balancedness_mean=summary[0],
        balancedness_min=summary[1],
        balancedness_p50=summary[2],
        **fields,
    )


def loads(num_replicas: int) -> pb.GetLoadsResponse:
    return pb.GetLoadsResponse(
        replicas=[
            pb.ReplicaLoad(replica=i, in_flight=5, running=4, waiting=1, kv_usage=0.5, step=100)
            for i in range(num_replicas)
        ]
    )


def placement_message(
    placement: Placement, layers: Sequence[int] | None = None
) -> pb.GetExpertPlacementResponse:
    rows = placement.physical_to_logical.tolist()
    return pb.GetExpertPlacementResponse(
        epoch=placement.epoch,
        num_experts=placement.num_experts,
        num_ranks=placement.num_ranks,
        ranks_per_node=placement.ranks_per_node,
        slots_per_rank=placement.slots_per_rank,
        layers=[
            pb.LayerSlots(layer=layer, experts=row)
            for layer, row in zip(layers or range(1, len(rows) + 1), rows, strict=True)
        ],
    )


def wait_until(condition: Any, timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)
