"""What clients meet: one gateway, and over it the servers that the configuration asks for."""

from typing import Any, NamedTuple

from cluster.config import ServeConfig
from cluster.engine.link_keys import LinkKeys
from cluster.rebalancer import Rebalancer
from cluster.server.chat.template import ChatTemplate
from cluster.server.constraint_check import ConstraintCheck
from cluster.server.gateway import Gateway
from cluster.server.observe.observability import Observability
from cluster.server.request import ModelInfo
from cluster.server.rpc.control import TraceSteps
from cluster.server.rpc.service import GrpcServer
from cluster.server.security import Credentials
from cluster.server.tokenizer import load_tokenizer


class Endpoints(NamedTuple):
    """Where a cluster answers."""

    grpc: str
    """host:port"""
    http: str | None
    """URL of the OpenAI-compatible front end, if there is one."""


class FrontEnd:
    """Use it from one event loop: `gateway.start`, attach the replicas, `start`, and at last `stop`.

    gateway_host: the one address of this host that leaders can reach, with `keys`. host_name: of this host, for
    endpoints, where the servers listen on all addresses.
    """

    def __init__(
        self,
        config: ServeConfig,
        model_info: ModelInfo,
        credentials: Credentials,
        *,
        gateway_host: str,
        host_name: str,
        keys: LinkKeys,
    ) -> None:
        self._observability = Observability(config, model_info)
        self._template = ChatTemplate.load(config.model, config.chat)
        self._constraints = ConstraintCheck(
            config.model, model_info.vocab_size, model_info.eos_token_ids
        )
        self.gateway = Gateway(
            config,
            load_tokenizer(config.model),
            model_info,
            bind_host=gateway_host,
            observer=self._observability.observer,
            chat=self._template,
            check_constraint=self._constraints.check,
            keys=keys,
        )
        self._config = config
        self._credentials = credentials
        self._host_name = host_name
        self._servers: list[Any] = []

    async def start(
        self, rebalancer: Rebalancer | None, trace_steps: TraceSteps | None = None
    ) -> Endpoints:
        """Listen; clients are told that we are not ready until `gateway.set_ready(True)`.

        Raises ConfigError where an address cannot be used, or an optional library is missing.
        """
        self._observability.watch(self.gateway, rebalancer)
        grpc = GrpcServer(self.gateway, self._config, rebalancer, self._credentials, trace_steps)
        grpc_port = await grpc.start()
        self._servers.append(grpc)
        url = None
        if self._config.server.http_port is not None:
            scheme = "http" if self._credentials.tls_files is None else "https"
            url = f"{scheme}://{self._address(await self._start_http())}"
        return Endpoints(self._address(grpc_port), url)

    async def stop(self) -> None:
        """Refuse new calls and end those that are left, a second later."""
        while self._servers:
            await self._servers.pop().stop(1.0)
        await self._observability.close()
        self._constraints.close()
        if self._template:
            self._template.close()

    async def _start_http(self) -> int:
        from cluster.server.http.server import HttpServer

        shown = self._observability
        http = HttpServer(self.gateway, self._config, self._credentials, shown.metrics, shown.live)
        port: int = await http.start()
        self._servers.append(http)
        return port

    def _address(self, port: int) -> str:
        host = self._config.server.host
        if host in ("0.0.0.0", "::"):
            host = self._host_name
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
