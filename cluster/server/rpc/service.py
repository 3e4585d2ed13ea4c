"""One gRPC server over one gateway: all services, their limits, and the port they listen on."""

import grpc.aio
from grpc_health.v1 import health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from cluster.config import ConfigError, ServeConfig
from cluster.rebalancer import Rebalancer
from cluster.server.gateway import Gateway
from cluster.server.proto.expertmesh.v1 import control_pb2_grpc, inference_pb2_grpc
from cluster.server.rpc import control, health, inference
from cluster.server.rpc.access import TokenCheck
from cluster.server.security import Credentials
from cluster.server.unreadable import RefuseUnreadable

_KEEPALIVE_MS = 30_000
_KEEPALIVE_TIMEOUT_MS = 10_000
_HANDSHAKE_TIMEOUT_MS = 10_000


class GrpcServer:
    """Serves from `start` to `stop`; runs in the gateway's event loop.

    Without a rebalancer, calls about experts and their balance are refused, and without `trace_steps`
    those of that name. Credentials None: those that the configuration names; ConfigError where they
    cannot be used.
    """

    def __init__(
        self,
        gateway: Gateway,
        config: ServeConfig,
        rebalancer: Rebalancer | None = None,
        credentials: Credentials | None = None,
        trace_steps: control.TraceSteps | None = None,
    ) -> None:
        self._gateway = gateway
        self._rebalancer = rebalancer
        self._trace_steps = trace_steps
        self._credentials = credentials or Credentials.load(config.server)
        self._config = config.server
        self._server: grpc.aio.Server | None = None

    async def start(self) -> int:
        """Listen and return the bound port; raises ConfigError if the address cannot be used."""
        config = self._config
        names = (inference.SERVICE_NAME, control.SERVICE_NAME)
        open_services = (health.SERVICE_NAME, reflection.SERVICE_NAME)
        server = grpc.aio.server(
            interceptors=[TokenCheck(self._credentials, open_services), RefuseUnreadable()],
            options=self._options(),
            maximum_concurrent_rpcs=config.max_concurrent_rpcs,
        )
        inference_pb2_grpc.add_InferenceServicer_to_server(
            inference.InferenceServicer(self._gateway), server
        )
        servicer = control.ControlServicer(
            self._gateway, self._rebalancer, self._credentials, self._trace_steps
        )
        control_pb2_grpc.add_ControlServicer_to_server(servicer, server)
        health_pb2_grpc.add_HealthServicer_to_server(
            health.HealthServicer(self._gateway.readiness, names), server
        )
        reflection.enable_server_reflection((*names, *open_services), server)
        port = self._listen(server)
        await server.start()
        self._server = server
        return port

    async def stop(self, grace_s: float = 1.0) -> None:
        """Refuse new calls, give running ones `grace_s` seconds, then cancel them."""
        if self._server:
            server, self._server = self._server, None
            await server.stop(grace_s)

    def _listen(self, server: grpc.aio.Server) -> int:
        host, port = self._config.host, self._config.port
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        tls = self._credentials.grpc
        try:
            return (
                server.add_secure_port(address, tls) if tls else server.add_insecure_port(address)
            )
        except RuntimeError as error:
            raise ConfigError(
                f"server.host, server.port: cannot listen on {address}: {error}"
            ) from None

    def _options(self) -> list[tuple[str, int]]:
        return [
            # Otherwise a second server on the same port takes half of the calls, silently.
            ("grpc.so_reuseport", 0),
            ("grpc.max_receive_message_length", self._config.max_message_mib << 20),
            ("grpc.max_send_message_length", -1),
            ("grpc.max_metadata_size", self._config.max_metadata_kib << 10),
            ("grpc.absolute_max_metadata_size", self._config.max_metadata_kib << 10),
            # One connection may have as many calls as all of them together.
            ("grpc.max_concurrent_streams", self._config.max_concurrent_rpcs),
            ("grpc.server_handshake_timeout_ms", _HANDSHAKE_TIMEOUT_MS),
            # Clients whose host died say no goodbye; without an answer their requests end.
            ("grpc.keepalive_time_ms", _KEEPALIVE_MS),
            ("grpc.keepalive_timeout_ms", _KEEPALIVE_TIMEOUT_MS),
            # Clients that ping during a long prefill must not be sent away.
            ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
            ("grpc.keepalive_permit_without_calls", 1),
        ]
