"""Metrics of the server and of its replicas, as each of them last reported."""

import time
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata

from prometheus_client import Metric
from prometheus_client.registry import Collector

from cluster.config import ServeConfig
from cluster.server.gateway import Gateway
from cluster.server.leaders import Replica
from cluster.server.observe.metric_families import Families

_Table = tuple[tuple[str, str, Callable[[Replica], float]], ...]

GAUGES: _Table = (
    ("num_requests_in_flight", "Given to the engine and not ended.", lambda r: r.in_flight),
    ("num_requests_running", "Requests in the engine's steps.", lambda r: r.stats.running),
    ("num_requests_waiting", "Requests that wait to be in its steps.", lambda r: r.stats.waiting),
    ("kv_cache_usage_perc", "Share of the KV cache in use; 1 is all.", lambda r: r.stats.kv_usage),
    ("placement_epoch", "Of the placement of experts in force.", lambda r: r.stats.epoch),
    (
        "replica_silence_seconds",
        "Since the engine was last heard of.",
        lambda r: time.monotonic() - r.last_heard,
    ),
)
COUNTERS: _Table = (
    ("steps", "Steps executed.", lambda r: r.stats.step),
    (
        "num_preemptions",
        "Requests put back to make room, to be computed again.",
        lambda r: r.stats.preemptions,
    ),
    (
        "prefix_cache_queries",
        "Tokens of prompts looked for in the cache.",
        lambda r: r.stats.prefix_queries,
    ),
    ("prefix_cache_hits", "Tokens of prompts found there.", lambda r: r.stats.prefix_hits),
)


class ReplicaMetrics(Collector):
    """Collects what the gateway knows when it is asked; nothing before there is a gateway."""

    def __init__(self, config: ServeConfig, model_name: str) -> None:
        self.gateway: Gateway | None = None
        self._cache_config = config.cache.model_dump()
        self._families = Families(model_name)

    def collect(self) -> Iterator[Metric]:
        if self.gateway is None:
            return
        yield from self._server(self.gateway)
        replicas, make = self.gateway.replicas, self._families
        for name, help_text, read in GAUGES:
            yield make.gauge(name, help_text, ("engine",), _by_engine(replicas, read))
        for name, help_text, read in COUNTERS:
            yield make.counter(name, help_text, ("engine",), _by_engine(replicas, read))
        yield make.gauge(
            "kv_cache_blocks",
            "Blocks of the KV cache: held by requests, kept for later ones, or free.",
            ("engine", "state"),
            {
                (str(replica.idx), state): blocks
                for replica in replicas
                for state, blocks in _blocks(replica).items()
            },
        )
        yield make.counter(
            "step_seconds",
            "What the engine's leader spent its steps with.",
            ("engine", "phase"),
            {
                (str(replica.idx), phase): seconds
                for replica in replicas
                for phase, seconds in replica.stats.phases.items()
            },
        )

    def _server(self, gateway: Gateway) -> Iterator[Metric]:
        make = self._families
        yield make.gauge("ready", "1: requests are admitted.", (), {(): gateway.readiness.ready})
        yield make.gauge(
            "draining", "1: no new requests, those in flight go on.", (), {(): gateway.draining}
        )
        yield make.info("build_info", "What serves.", {"version": _version()})
        yield make.info(
            "cache_config_info", "How each replica's KV cache is made.", self._cache_config
        )


def _by_engine(
    replicas: Sequence[Replica], read: Callable[[Replica], float]
) -> dict[tuple[str, ...], float]:
    return {(str(replica.idx),): read(replica) for replica in replicas}


def _blocks(replica: Replica) -> dict[str, int]:
    stats = replica.stats
    free = stats.kv_blocks_total - stats.kv_blocks_used - stats.kv_blocks_cached
    return {"used": stats.kv_blocks_used, "cached": stats.kv_blocks_cached, "free": max(0, free)}


def _version() -> str:
    try:
        return metadata.version("expertmesh")
    except metadata.PackageNotFoundError:
        return "unknown"
