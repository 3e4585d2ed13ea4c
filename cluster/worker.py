"""One rank of the cluster. A plain class; the controller makes it a Ray actor."""

import gc
import logging
from typing import Any

import ray

from cluster.config import ServeConfig
from cluster.engine.engine import Follower, Leader, build_engine
from cluster.engine.mailbox import ZmqMailbox
from comms.groups import ParallelGroups
from comms.store import connect_store, host_store
from comms.topology import Topology

logger = logging.getLogger(__name__)


class Worker:
    """Life of a rank: `where`, `host_store` (rank 0 only), `load`, `run` until told to stop."""

    def __init__(self, config: ServeConfig, topology: Topology, rank: int) -> None:
        self._config = config
        self._topology = topology
        self._rank = rank
        self._mailbox: ZmqMailbox | None = None
        self._engine: Leader | Follower | None = None

    def where(self) -> tuple[str, str]:
        """(Ray node id, IP address) of the host we run on."""
        return ray.get_runtime_context().get_node_id(), ray.util.get_node_ip_address()

    def host_store(self, host: str) -> str:
        """Open the store that all ranks meet at, on this address of ours; returns "host:port"."""
        self._store, address = host_store(host, self._config.ray.startup_timeout_s)
        return address

    def load(self, store_address: str, host: str) -> dict[str, Any]:
        """Connect to the other ranks from our address `host`; load this rank's share of the model.

        Returns {"rank", "memory": bytes by kind, "mailbox": the leader's address or None}.
        """
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
            self._mailbox = ZmqMailbox(host)
        self._engine = build_engine(self._config, self._groups, self._mailbox)
        return {
            "rank": self._rank,
            "memory": self._engine.runner.memory(),
            "mailbox": self._mailbox and self._mailbox.address,
        }

    def run(self, gateway_address: str) -> None:
        """Step until all replicas were told to stop. Ends with an error when a peer is lost."""
        assert self._engine is not None, "load comes before run"
        if self._mailbox:
            self._mailbox.connect(gateway_address)
        gc.collect()
        gc.freeze()  # what lives as long as we do need not be looked at in the middle of a step
        try:
            while self._engine.step():
                pass
        finally:
            if self._mailbox:
                self._mailbox.close()
            self._groups.abort()

    def stats(self) -> dict[str, Any]:
        """Counters since the start: see `Runner.stats`."""
        assert self._engine is not None, "load comes before stats"
        return {"rank": self._rank, **self._engine.runner.stats()}
