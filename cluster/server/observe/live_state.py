"""What the live page shows: the last minutes of a cluster, one sample a second, and how it stands now.

Everything is plain JSON values. Texts and token ids of requests are never among them.

R ranks, L layers with experts.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Iterator
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

from cluster.balance_record import balancedness
from cluster.config import ServeConfig
from cluster.rebalancer import Rebalancer
from cluster.server.errors import Code
from cluster.server.gateway import Gateway
from cluster.server.observe.observer import Observer

if TYPE_CHECKING:
    from cluster.server.in_flight import InFlight

SAMPLE_S = 1.0
SAMPLES_KEPT = 900
REQUESTS_SHOWN = 50
LATEST = 200
"""Requests whose times to the first token and between tokens are looked at."""

logger = logging.getLogger(__name__)
Json = dict[str, Any]


class LiveState(Observer):
    """An observer of requests from its making; takes samples from `start` to `stop`."""

    def __init__(self, config: ServeConfig) -> None:
        self._config = config
        self._requests: dict[str, InFlight] = {}
        self._counts = dict.fromkeys(("tokens", "prompt_tokens", "ended", "failed", "refused"), 0)
        self._ttft_s: deque[float] = deque(maxlen=LATEST)
        self._tpot_s: deque[float] = deque(maxlen=LATEST)
        self._history: deque[Json] = deque(maxlen=SAMPLES_KEPT)
        self._sampled = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._started = time.monotonic()

    # Life ---------------------------------------------------------------------------------------

    def start(self, gateway: Gateway, rebalancer: Rebalancer | None = None) -> None:
        """Without a rebalancer it knows nothing of experts, ranks and links."""
        self._gateway, self._rebalancer = gateway, rebalancer
        self._task = asyncio.create_task(self._run(), name="live-state")

    async def stop(self) -> None:
        if self._task:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    # What the gateway tells ---------------------------------------------------------------------

    def refused(self, code: Code) -> None:
        self._counts["refused"] += 1

    def admitted(self, request: InFlight) -> None:
        self._requests[request.info.request_id] = request
        self._counts["prompt_tokens"] += request.info.num_tokens

    def progressed(self, request: InFlight, num_tokens: int, since_last_s: float | None) -> None:
        self._counts["tokens"] += num_tokens
        if since_last_s is None:
            self._ttft_s.append(time.monotonic() - request.arrived)
        else:
            self._tpot_s.append(since_last_s / num_tokens)

    def ended(self, request: InFlight, outcome: str) -> None:
        self._requests.pop(request.info.request_id, None)
        self._counts["ended" if outcome in ("stop", "length", "abort") else "failed"] += 1

    # What the page asks -------------------------------------------------------------------------

    def everything(self) -> Json:
        """What a page needs first: facts that do not change, and the samples so far."""
        parallel = self._config.parallel
        return {
            "model": self._gateway.model.name,
            "num_nodes": parallel.num_nodes,
            "ranks_per_node": parallel.ranks_per_node,
            "tensor_parallel_size": parallel.tp_size,
            "num_replicas": parallel.num_replicas,
            "layers": list(self._rebalancer.facts.model_layers) if self._rebalancer else [],
            "sample_s": SAMPLE_S,
            "history": list(self._history),
            "now": self.now(),
        }

    def now(self) -> Json:
        """What only the latest value matters of."""
        return {
            "state": self._state(),
            "uptime_s": round(time.monotonic() - self._started),
            "replicas": [_replica(replica) for replica in self._gateway.replicas],
            "requests": list(self._shown_requests()),
            "num_requests": len(self._requests),
            **self._experts(),
        }

    async def next_sample(self) -> Json:
        """The sample after the present one, once it is taken."""
        await self._sampled.wait()
        return self._history[-1]

    # How it is made -----------------------------------------------------------------------------

    async def _run(self) -> None:
        before, at = dict(self._counts), time.monotonic()
        while True:
            await asyncio.sleep(SAMPLE_S)
            try:
                now, seconds = time.monotonic(), time.monotonic() - at
                per_s = {k: round((v - before[k]) / seconds, 3) for k, v in self._counts.items()}
                self._history.append(self._sample(per_s))
                before, at = dict(self._counts), now
            except Exception:
                logger.exception("no sample for the live page")
                continue
            sampled, self._sampled = self._sampled, asyncio.Event()
            sampled.set()

    def _sample(self, per_s: dict[str, float]) -> Json:
        replicas = self._gateway.replicas
        return {
            "at": round(time.time(), 1),
            **{f"{name}_per_s": value for name, value in per_s.items()},
            "running": sum(replica.stats.running for replica in replicas),
            "waiting": sum(replica.stats.waiting for replica in replicas),
            "kv_usage": max((replica.stats.kv_usage for replica in replicas), default=0.0),
            "ttft_ms": _milliseconds(self._ttft_s),
            "tpot_ms": _milliseconds(self._tpot_s),
            **self._balance(),
        }

    def _balance(self) -> Json:
        """Of the last looks at the ranks; None where nothing was served."""
        if self._rebalancer is None or self._rebalancer.loads.record.last is None:
            return {}
        record, counters = self._rebalancer.loads.record, self._rebalancer.counters
        busy_L = [value for value in balancedness(record.served()[1]).tolist() if value > 0]
        intra_R, inter_R = record.sent_per_s()
        return {
            "balancedness": round(sum(busy_L) / len(busy_L), 4) if busy_L else None,
            "balancedness_min": round(min(busy_L), 4) if busy_L else None,
            "intra_node_bytes_per_s": round(float(intra_R.sum())),
            "inter_node_bytes_per_s": round(float(inter_R.sum())),
            "epoch": self._rebalancer.placement.epoch,
            "moves": counters.moves,
        }

    def _experts(self) -> Json:
        """The heat map [L][R], the ranks' links, and what the rebalancer does."""
        if self._rebalancer is None or (last := self._rebalancer.loads.record.last) is None:
            return {}
        record, counters = self._rebalancer.loads.record, self._rebalancer.counters
        window_s, served_RL = record.served()
        intra_R, inter_R = record.sent_per_s()
        mean_L = np.maximum(served_RL.mean(axis=0), 1e-9)
        return {
            "window_s": round(window_s, 1),
            "load": np.round(served_RL / mean_L, 3).T.tolist() if served_RL.any() else [],
            "links": [
                {"intra": round(intra), "inter": round(inter), "step_ms": round(step_ms, 2)}
                for intra, inter, step_ms in zip(intra_R, inter_R, last.step_ms_R, strict=True)
            ],
            "rebalances": {
                "state": self._rebalancer.state,
                "running": self._rebalancer.running,
                "doing": counters.doing,
                "started": counters.started,
                "finished": counters.finished,
                "abandoned": counters.abandoned,
                "moves": counters.moves,
                "bytes": last.moved_bytes,
                "stall_ms": round(last.stall_ms, 3),
                "last_reason": counters.last_reason,
                "last_error": counters.last_error,
            },
        }

    def _state(self) -> str:
        if self._gateway.draining:
            return "draining"
        return "ready" if self._gateway.readiness.ready else "not ready"

    def _shown_requests(self) -> Iterator[Json]:
        """The oldest first, so that what hangs is seen."""
        now = time.monotonic()
        for request_id, request in list(self._requests.items())[:REQUESTS_SHOWN]:
            yield {
                "id": request_id,
                "replica": request.info.replica,
                "age_s": round(now - request.arrived, 1),
                "prompt_tokens": request.info.num_tokens,
                "cached_tokens": request.cached_tokens,
                "tokens": request.num_completion_tokens,
                "max_tokens": request.info.max_tokens * request.num_choices,
            }


def _replica(replica: Any) -> Json:
    stats = replica.stats
    return {
        "replica": replica.idx,
        "in_flight": replica.in_flight,
        "running": stats.running,
        "waiting": stats.waiting,
        "kv_usage": round(stats.kv_usage, 4),
        "last_heard_s": round(time.monotonic() - replica.last_heard, 1),
    }


def _milliseconds(seconds: deque[float]) -> float | None:
    """The median; None before the first."""
    return round(1e3 * median(seconds), 2) if seconds else None
