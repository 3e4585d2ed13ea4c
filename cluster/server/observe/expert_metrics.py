"""Metrics of the experts and ranks, as the rebalancer last saw them (`eplb_config.interval_s`).

R ranks, L layers with experts.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from prometheus_client import Metric
from prometheus_client.registry import Collector

from cluster.balance_record import BalanceRecord, Look, balancedness
from cluster.rebalancer import Rebalancer
from cluster.server.observe.metric_families import Families


class ExpertMetrics(Collector):
    """Collects what the rebalancer knows when it is asked; nothing before there is one."""

    def __init__(self, model_name: str) -> None:
        self.rebalancer: Rebalancer | None = None
        self._families = Families(model_name)

    def collect(self) -> Iterator[Metric]:
        if self.rebalancer is None:
            return
        yield from self._rebalances(self.rebalancer)
        record = self.rebalancer.loads.record
        if record.last is not None:
            yield from self._balance(record, self.rebalancer.facts.model_layers)
            yield from self._moved(record.last)
            yield from self._ranks(record.last)

    def _rebalances(self, rebalancer: Rebalancer) -> Iterator[Metric]:
        make, counters = self._families, rebalancer.counters
        yield make.counter(
            "eplb_rebalances",
            "Rebalances that ended, with all layers changed or given up midway.",
            ("outcome",),
            {("finished",): counters.finished, ("abandoned",): counters.abandoned},
        )
        yield make.gauge("eplb_rebalancing", "1: experts move.", (), {(): rebalancer.running})
        yield make.gauge(
            "eplb_failures_in_a_row", "Since the last success.", (), {(): counters.failures}
        )
        yield make.counter(
            "eplb_moves", "Experts given to ranks that lacked them.", (), {(): counters.moves}
        )

    def _balance(self, record: BalanceRecord, layers: tuple[int, ...]) -> Iterator[Metric]:
        make = self._families
        served_L = balancedness(record.served()[1])
        busy = served_L[served_L > 0]
        for name, of_layers, reduce in (
            ("eplb_balancedness", "mean", np.mean),
            ("eplb_balancedness_min", "minimum", np.min),
            ("eplb_balancedness_p50", "median", np.median),
        ):
            yield make.gauge(
                name,
                f"Mean / maximum load of ranks lately, {of_layers} of layers; absent: no load.",
                (),
                {(): float(reduce(busy))} if len(busy) else {},
            )
        yield make.gauge(
            "eplb_layer_balancedness",
            "Mean / maximum load of ranks lately; 0: no load.",
            ("layer",),
            {(str(layer),): value for layer, value in zip(layers, served_L.tolist(), strict=True)},
        )

    def _moved(self, last: Look) -> Iterator[Metric]:
        make = self._families
        yield make.counter(
            "eplb_migrated_bytes", "Of experts that came to ranks.", (), {(): last.moved_bytes}
        )
        yield make.counter(
            "eplb_stall_seconds",
            "Steps waited for experts to move, on the rank where they waited longest.",
            (),
            {(): last.stall_ms / 1e3},
        )

    def _ranks(self, last: Look) -> Iterator[Metric]:
        make, links = self._families, ("intra_node", "inter_node")
        yield make.counter(
            "eplb_rank_load",
            "(Token, expert) pairs computed.",
            ("rank",),
            {(str(r),): pairs for r, pairs in enumerate(last.served_RL.sum(axis=1).tolist())},
        )
        yield make.counter(
            "sent_bytes",
            "Sent to bring tokens to experts and back, inside nodes and between them.",
            ("rank", "link"),
            {
                (str(rank), link): num_bytes
                for link, bytes_R in zip(
                    links, (last.intra_node_bytes_R, last.inter_node_bytes_R), strict=True
                )
                for rank, num_bytes in enumerate(bytes_R.tolist())
            },
        )
        yield make.gauge(
            "rank_step_seconds",
            "Median of recent steps; 0: none.",
            ("rank",),
            {(str(rank),): step_ms / 1e3 for rank, step_ms in enumerate(last.step_ms_R)},
        )
