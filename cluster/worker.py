"""One rank of the cluster. A plain class; the controller makes it a Ray actor."""

import gc
import logging
import os
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import psutil
import ray

from cluster import logs
from cluster.config import ServeConfig
from cluster.engine.engine import Follower, Leader, build_engine
from cluster.engine.link_keys import LinkKeys
from cluster.engine.mailbox import ZmqMailbox
from cluster.engine.step_recorder import StepRecorder
from cluster.engine.warm_up import warm_up
from cluster.gpus import see_gpus
from comms.groups import ParallelGroups
from comms.store import connect_store, host_store
from comms.topology import Topology
from comms.trace import Trace

FLIP_TIMEOUT_S = 5.0
NICENESS = 5
"""Where the gateway shares its host with ranks, they would keep it waiting for milliseconds with every frame
and every refusal, for the little processor time that it needs. Threads inherit it from the first."""

logger = logging.getLogger(__name__)


class Place(NamedTuple):
    """Where a rank is: Ray's node id, the IP address of that host, and Ray's name of the GPU that it has
    there, if it has one."""

    node_id: str
    address: str
    gpu: str | None


class Worker:
    """Life of a rank: `where`, `host_store` (rank 0 only), `load`, `warm_up`, `run` until told to stop.

    `doing` may be asked at any time.
    """

    def __init__(self, config: ServeConfig, topology: Topology, rank: int, keys: LinkKeys) -> None:
        os.nice(NICENESS)
        logs.configure(config.observability, f"rank {rank}")
        self._config = config
        self._keys = keys
        self._topology = topology
        self._rank = rank
        self._mailbox: ZmqMailbox | None = None
        self._engine: Leader | Follower | None = None
        self._doing = "started"

    def where(self) -> Place:
        context = ray.get_runtime_context()
        gpus = context.get_accelerator_ids()["GPU"] if self._config.device == "cuda" else []
        return Place(context.get_node_id(), ray.util.get_node_ip_address(), next(iter(gpus), None))

    def doing(self) -> str:
        """What this rank is at, and its memory, for whoever waits for it to start."""
        mib = psutil.Process().memory_info().rss / (1 << 20)
        return f"{self._doing}, {mib:.0f} MiB of memory"

    def host_store(self, host: str) -> str:
        """Open the store that all ranks meet at, on this address of ours; returns "host:port"."""
        self._store, address = host_store(host, self._config.ray.startup_timeout_s)
        return address

    def load(self, store_address: str, host: str, gpus: Sequence[str] = ()) -> dict[str, Any]:
        """Connect to the other ranks from our address `host`; load this rank's share of the model.

        gpus: of all ranks on this host, ours first. Returns {"rank", "memory": bytes by kind, "mailbox":
        the leader's address or None, "placement": of the experts on all ranks, from rank 0; None from
        the others}.
        """
        if gpus:
            see_gpus(gpus)
        self._doing = "connecting to the other ranks"
        self._groups = ParallelGroups.connect(
            self._topology,
            self._rank,
            connect_store(store_address, self._config.ray.startup_timeout_s),
            node_backend=self._config.comms.node_backend,
            inter_node_backend=self._config.comms.inter_node_backend,
            with_links=True,
            timeout_s=self._config.comms.timeout_s,
        )
        if self._topology.tp_rank_of(self._rank) == 0:
            self._mailbox = ZmqMailbox(host, self._keys)
        self._doing = "loading the model"
        self._engine = build_engine(self._config, self._groups, self._mailbox)
        self._recorder = StepRecorder(self._engine, self._groups)
        self._doing = "loaded"
        return {
            "rank": self._rank,
            "memory": self._engine.runner.memory(),
            "mailbox": self._mailbox and self._mailbox.address,
            "placement": self._engine.runner.migrator.placement if self._rank == 0 else None,
        }

    def warm_up(self) -> None:
        """The first steps; all ranks together."""
        self._doing = "computing its first steps"
        warm_up(self._loaded.runner)
        self._doing = "ready"

    def run(self, gateway_address: str) -> None:
        """Step until all replicas were told to stop. Ends with an error when a peer is lost."""
        engine = self._loaded
        if self._mailbox:
            self._mailbox.connect(gateway_address)
        gc.collect()
        gc.freeze()  # what lives as long as we do need not be looked at in the middle of a step
        try:
            while self._recorder.step():
                pass
        finally:
            if self._mailbox:
                self._mailbox.close()
            engine.runner.close()
            self._groups.abort()

    def expert_stats(self) -> dict[str, Any]:
        """See `Runner.expert_stats`; read while steps go on, so parts may be a step apart."""
        return self._loaded.runner.expert_stats()

    def prepare(self, epoch: int, layer: int, row: Sequence[int]) -> None:
        """Fetch what this rank needs to hold its slots of `row`, the next placement of `layer`.

        Steps go on meanwhile. Raises MigrationError if that fails; nothing has changed then.
        """
        runner = self._loaded.runner
        deadline = time.monotonic() + FLIP_TIMEOUT_S
        while runner.epoch < epoch - 1 and time.monotonic() < deadline:
            # Leaders report an epoch at the start of a step; the others may be a message behind.
            time.sleep(0.001)
        runner.prepare(epoch, layer, row)

    def abandon(self, epoch: int) -> None:
        """Forget what was prepared for `epoch`, or end its preparation."""
        self._loaded.runner.abandon(epoch)

    def begin_trace(self, timeout_s: float) -> int:
        """See `StepRecorder`, also for the next two."""
        return self._recorder.begin(timeout_s)

    def take_trace(self, first: int, until: int, timeout_s: float) -> Trace:
        return self._recorder.take(first, until, timeout_s)

    def end_trace(self) -> None:
        self._recorder.end()

    def stats(self) -> dict[str, Any]:
        """Counters since the start: see `Runner.stats`."""
        return {"rank": self._rank, **self._loaded.runner.stats()}

    @property
    def _loaded(self) -> Leader | Follower:
        assert self._engine is not None, "load comes first"
        return self._engine
