"""Brings a cluster up on Ray, watches it, and takes it down.

Ray places the ranks (one bundle per node), starts them and tells us when one dies; it is never on
the step path. Each rank's long `run()` call is its death sentinel: when one ends unasked, the
whole gang has failed, because expert-parallel collectives need every rank.
"""

import asyncio
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import ray
import torch
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster import logs
from cluster.config import ServeConfig
from cluster.engine.link_keys import LinkKeys
from cluster.engine.runner import max_model_len
from cluster.front_end import Endpoints, FrontEnd
from cluster.model.config import ModelConfig
from cluster.rebalancer import ExpertFacts, Rebalancer
from cluster.server.chat.template import ChatTemplate
from cluster.server.gateway import Gateway
from cluster.server.observe.step_trace import StepTracer
from cluster.server.request import ModelInfo
from cluster.server.security import Credentials
from cluster.startup import Progress, Startup
from cluster.worker import Worker
from comms.trace import Trace

PLACEMENT_TIMEOUT_S = 10.0
CONCURRENCY_GROUPS = {"watch": 1, "prepare": 1, "abandon": 1, "trace": 2}
"""Threads of a rank beside the one that runs steps: nothing waits for a call of another kind, and
calls of one kind keep their order."""
LOOPBACK = "127.0.0.1"

logger = logging.getLogger(__name__)


class NotEnoughResourcesError(RuntimeError):
    """The Ray cluster cannot hold the layout; the message says what is missing."""


class Controller:
    """One model's cluster: `start`, then `wait` until it fails or `stop` is called."""

    def __init__(self, config: ServeConfig) -> None:
        logs.configure(config.observability, "controller")
        self._config = config
        self._topology = config.parallel.topology
        self._placement_group: PlacementGroup | None = None
        self._workers: list[Any] = []
        self._sentinels: list[asyncio.Future[None]] = []
        self._watching: asyncio.Task[str | None] | None = None
        self._front: FrontEnd | None = None
        self._rebalancer: Rebalancer | None = None
        self._stopping = False
        self._startup = Startup(config.ray.startup_timeout_s, self._doing_of)
        self._host = LOOPBACK
        self._keys = LinkKeys.make()
        self._leader_addresses: list[str] = []

    async def progress(self) -> Progress:
        """What `start` is at, for whoever waits for it."""
        return self._startup.progress

    async def start(self) -> Endpoints:
        """Place, load and connect every rank; returns where the cluster answers.

        Raises ConfigError for what cannot be served as configured, NotEnoughResourcesError within
        about ten seconds when the layout cannot be placed, and what a rank raised (a checkpoint error,
        say) when loading fails.
        """
        credentials = Credentials.load(self._config.server)
        # Read again where chats are served; here, so that a bad one is refused before weights are read.
        ChatTemplate.load(self._config.model, self._config.chat)
        model_config = ModelConfig.from_dir(self._config.model)
        try:
            await self._place_workers()
            await self._load_workers()
            return await self._open_for_requests(model_config, credentials)
        except BaseException:
            await self.stop()
            raise

    async def wait(self) -> None:
        """Return once `stop` has ended the ranks; raise what ended a rank before that."""
        assert self._watching is not None, "start comes first"
        if reason := await asyncio.shield(self._watching):
            raise RuntimeError(reason)

    async def stop(self) -> None:
        """Drain, stop the ranks and give the resources back. Safe to call twice."""
        self._stopping = True
        if self._front:
            await self._front.gateway.drain()
            await self._front.stop()
        if self._rebalancer:
            await self._rebalancer.stop()
        if self._front:
            await self._front.gateway.stop()
        if self._sentinels:
            await asyncio.wait(self._sentinels, timeout=5.0)
        for worker in self._workers:
            ray.kill(worker)
        if self._placement_group:
            remove_placement_group(self._placement_group)
        self._workers, self._placement_group = [], None

    async def hurry(self) -> None:
        """Let `stop` wait for requests no longer: they end with UNAVAILABLE."""
        if self._front:
            await self._front.gateway.drain(0)

    async def stats(self) -> list[dict[str, Any]]:
        """One map per rank: expert load, bytes sent, memory and step times (see `Worker.stats`)."""
        calls = (
            worker.stats.options(concurrency_group="watch").remote() for worker in self._workers
        )
        return list(await asyncio.gather(*calls))

    async def _place_workers(self) -> None:
        check_resources(self._config)
        self._startup.begin(f"placing {self._topology.num_nodes} nodes on Ray")
        self._placement_group = placement_group(
            [_bundle(self._config)] * self._topology.num_nodes,
            strategy=self._config.ray.placement_strategy,
        )
        try:
            await asyncio.wait_for(self._placement_group.ready(), PLACEMENT_TIMEOUT_S)
        except TimeoutError:
            raise NotEnoughResourcesError(_shortage(self._config)) from None
        self._workers = [
            ray.remote(concurrency_groups=CONCURRENCY_GROUPS)(Worker)  # type: ignore[call-overload]
            .options(
                num_cpus=self._config.ray.cpus_per_rank,
                num_gpus=_gpus_per_rank(self._config),
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    self._placement_group,
                    placement_group_bundle_index=self._topology.node_of(rank),
                ),
            )
            .remote(self._config, self._topology, rank, self._keys)
            for rank in range(self._topology.world_size)
        ]

    async def _load_workers(self) -> None:
        """Raises StartupError, which names the ranks that were not ready in time."""
        hosts, gpus = await self._find_places()
        (store_address,) = await self._startup.all_ranks(
            "opening the store that ranks meet at", [self._workers[0].host_store.remote(hosts[0])]
        )
        reports = await self._startup.all_ranks(
            f"connecting {len(hosts)} ranks and loading {self._config.model}",
            [
                worker.load.remote(store_address, host, near)
                for worker, host, near in zip(self._workers, hosts, gpus, strict=True)
            ],
        )
        for report in reports:
            logger.info("rank %d loaded: %s", report["rank"], report["memory"])
        await self._startup.all_ranks(
            "computing the first steps", [worker.warm_up.remote() for worker in self._workers]
        )
        self._startup.begin("opening for requests")
        self._leader_addresses = [r["mailbox"] for r in reports if r["mailbox"] is not None]
        self._first_placement = reports[0]["placement"]

    async def _doing_of(self, rank: int) -> str:
        call = self._workers[rank].doing.options(concurrency_group="watch")
        return str(await call.remote())

    async def _find_places(self) -> tuple[list[str], list[list[str]]]:
        """For each rank the address it listens on, loopback unless ranks are on several hosts, and the GPUs
        of all ranks of its host, its own first."""
        places = await self._startup.all_ranks(
            f"starting {len(self._workers)} rank processes",
            [worker.where.remote() for worker in self._workers],
        )
        here = ray.get_runtime_context().get_node_id()
        gpus = [
            [near.gpu for near in (place, *places) if near.gpu and near.node_id == place.node_id]
            for place in places
        ]
        if all(place.node_id == here for place in places):
            return [LOOPBACK] * len(places), gpus
        self._host = ray.util.get_node_ip_address()
        return [place.address for place in places], gpus

    async def _open_for_requests(
        self, model_config: ModelConfig, credentials: Credentials
    ) -> Endpoints:
        self._front = FrontEnd(
            self._config,
            ModelInfo(
                name=self._config.model_name,
                vocab_size=model_config.vocab_size,
                max_model_len=max_model_len(self._config, model_config),
                eos_token_ids=model_config.eos_token_ids,
                architecture=model_config.architecture,
                dtype=self._config.dtype,
            ),
            credentials,
            gateway_host=self._host,
            host_name=ray.util.get_node_ip_address(),
            keys=self._keys,
        )
        gateway = self._front.gateway
        gateway_address = await gateway.start()
        for replica, address in enumerate(self._leader_addresses):
            gateway.attach(replica, address)
        self._sentinels = [
            asyncio.ensure_future(worker.run.remote(gateway_address)) for worker in self._workers
        ]
        self._rebalancer = self._watch_experts(model_config, gateway)
        tracer = StepTracer([RayRank(worker) for worker in self._workers])
        endpoints = await self._front.start(self._rebalancer, tracer.trace_file)
        gateway.set_ready(True)
        self._watching = asyncio.create_task(self._watch_ranks(gateway))
        return endpoints

    async def _watch_ranks(self, gateway: Gateway) -> str | None:
        """Why a rank ended before `stop`, which the requests are told at once, waited for or not."""
        done, _ = await asyncio.wait(self._sentinels, return_when=asyncio.FIRST_COMPLETED)
        if self._stopping:
            await asyncio.wait(self._sentinels, timeout=self._config.server.drain_timeout_s)
            return None
        failed = next(sentinel for sentinel in self._sentinels if sentinel in done)
        reason = f"rank {self._sentinels.index(failed)} ended: {_cause(failed)}"
        logger.error("%s", reason)
        gateway.fail(reason)
        return reason

    def _watch_experts(self, model_config: ModelConfig, gateway: Gateway) -> Rebalancer:
        rebalancer = Rebalancer(
            self._config.eplb_config,
            ExpertFacts(
                model_layers=model_config.moe_layers,
                experts_per_token=model_config.gate.num_experts_per_token,
                expert_bytes=_expert_bytes(model_config, self._config.dtype),
            ),
            self._first_placement,
            [RayRank(worker) for worker in self._workers],
            gateway,
        )
        rebalancer.start()
        return rebalancer


class RayRank:
    """A rank as the rebalancer and the tracer of steps ask it: see `cluster.ranks.Rank`, `TracedRank`."""

    def __init__(self, worker: Any) -> None:
        self._worker = worker

    async def expert_stats(self) -> Mapping[str, Any]:
        stats: Mapping[str, Any] = await self._call("expert_stats", "watch")
        return stats

    async def prepare(self, epoch: int, layer: int, row: Sequence[int]) -> None:
        await self._call("prepare", "prepare", epoch, layer, row)

    async def abandon(self, epoch: int) -> None:
        await self._call("abandon", "abandon", epoch)

    async def begin_trace(self, timeout_s: float) -> int:
        first: int = await self._call("begin_trace", "trace", timeout_s)
        return first

    async def take_trace(self, first: int, until: int, timeout_s: float) -> Trace:
        trace: Trace = await self._call("take_trace", "trace", first, until, timeout_s)
        return trace

    async def end_trace(self) -> None:
        await self._call("end_trace", "trace")

    async def _call(self, method: str, group: str, *arguments: Any) -> Any:
        """Its answer, or what it raised itself instead of Ray's report of that."""
        call = getattr(self._worker, method).options(concurrency_group=group)
        try:
            return await call.remote(*arguments)
        except ray.exceptions.RayTaskError as error:
            raise error.cause if isinstance(error.cause, Exception) else error from None


def check_resources(config: ServeConfig) -> None:
    """Raise NotEnoughResourcesError at once when the whole Ray cluster is too small for the layout."""
    num_nodes = config.parallel.num_nodes
    total = ray.cluster_resources().get("CPU", 0.0)
    hosts = sum(node["Alive"] for node in ray.nodes())
    one_host_each = config.ray.placement_strategy == "STRICT_SPREAD"
    gpus = ray.cluster_resources().get("GPU", 0.0)
    if (
        total < _cpus_per_node(config) * num_nodes
        or gpus < config.parallel.world_size * _gpus_per_rank(config)
        or (one_host_each and hosts < num_nodes)
    ):
        raise NotEnoughResourcesError(_shortage(config))


def _expert_bytes(model: ModelConfig, dtype: str) -> int:
    """Of one expert's three matrices."""
    elements = 3 * model.hidden_size * model.expert_intermediate_size
    return elements * int(getattr(torch, dtype).itemsize)


def _cpus_per_node(config: ServeConfig) -> float:
    return config.parallel.ranks_per_node * config.ray.cpus_per_rank


def _gpus_per_rank(config: ServeConfig) -> int:
    """Ray hides all GPUs from a rank that asks for none."""
    return 1 if config.device == "cuda" else 0


def _bundle(config: ServeConfig) -> dict[str, float]:
    """What a node of the layout takes of a host."""
    gpus = config.parallel.ranks_per_node * _gpus_per_rank(config)
    return {"CPU": _cpus_per_node(config), **({"GPU": float(gpus)} if gpus else {})}


def _shortage(config: ServeConfig) -> str:
    parallel, placement = config.parallel, config.ray
    hosts = [f"{node['Resources'].get('CPU', 0):g}" for node in ray.nodes() if node["Alive"]]
    need = _cpus_per_node(config) * parallel.num_nodes
    free = ray.available_resources().get("CPU", 0.0)
    gpus = ray.cluster_resources().get("GPU", 0.0)
    wanted = parallel.world_size * _gpus_per_rank(config)
    if wanted > gpus:
        return (
            f"device = cuda with {parallel.world_size} ranks needs {wanted} GPUs; Ray has {gpus:g}"
        )
    return (
        f"the layout needs {parallel.num_nodes} nodes x {parallel.ranks_per_node} ranks x "
        f"ray.cpus_per_rank {placement.cpus_per_rank:g} = {need:g} CPUs placed by "
        f"{placement.placement_strategy}; Ray has {len(hosts)} host(s) with "
        f"{' + '.join(hosts)} CPUs, {free:g} of them free. Add hosts, stop other jobs, lower "
        "ray.cpus_per_rank, or choose a smaller layout"
    )


def _cause(sentinel: asyncio.Future[None]) -> str:
    error = sentinel.exception()
    if error is None:
        return "its loop returned unasked"
    logger.error("%s", error)  # with the rank's own traceback
    cause = getattr(error, "cause", error)
    return f"{type(cause).__name__}: {cause}"
