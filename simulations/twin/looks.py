"""A rebalancer's view of the ranks, from reports at hand: the served cluster's watch and planner.

L layers with experts, E logical experts, M sampled tokens, K experts per token.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from numpy.typing import ArrayLike

from cluster.config import EplbConfig
from cluster.engine.runner import ROWS_SAMPLED
from cluster.load_watch import LoadWatch
from cluster.rebalance_draft import Draft, draft
from router.load import LoadWindow
from router.placement import Placement

__all__ = ["ROWS_SAMPLED", "Looks", "Report", "report"]

Report = Mapping[str, Any]


def report(routed_LE: ArrayLike, rows: Sequence[ArrayLike]) -> Report:
    """What plans need of `Runner.expert_stats`: the gate's choices since the start, and the experts
    [M, K] of a few tokens of the latest batch, by layer."""
    return {
        "routed": routed_LE,
        "rows": rows,
        "served": [0] * len(rows),
        "bytes": {"intra_node": 0, "inter_node": 0},
        "migration": {"bytes": {}, "flip_s": 0.0},
        "step_seconds": [],
    }


class Looks:
    """`add` one look after the other; `draft` what a rebalance asked for now would do."""

    def __init__(self, config: EplbConfig, placement: Placement, experts_per_token: int) -> None:
        self._config = config
        self._ranks = [_Reported() for _ in range(placement.num_ranks)]
        self._watch = LoadWatch(
            self._ranks,
            LoadWindow(placement.num_layers, placement.num_experts, horizon=config.window_size),
            experts_per_token=experts_per_token,
        )

    def add(self, reports: Sequence[Report]) -> None:
        """One report of every rank, in the order of ranks."""
        for rank, latest in zip(self._ranks, reports, strict=True):
            rank.latest = latest
        asyncio.run(self._watch.look())

    def draft(self, placement: Placement) -> Draft:
        """Raises ValueError before the first tokens."""
        load = self._watch.load()
        if load is None:
            raise ValueError("no look has seen a token: nothing can be planned")
        config = self._config
        return draft(load, placement, target=config.target, node_traffic=config.node_traffic)


class _Reported:
    """A rank that has said all it will say. Experts do not move here."""

    latest: Report = {}  # noqa: RUF012  (replaced, never changed)

    async def expert_stats(self) -> Report:
        return self.latest

    async def prepare(self, epoch: int, layer: int, row: Sequence[int]) -> None:
        raise NotImplementedError

    async def abandon(self, epoch: int) -> None:
        raise NotImplementedError
