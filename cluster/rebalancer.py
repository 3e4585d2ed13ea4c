"""Watches the experts' load and keeps the placement fit for it, while the cluster serves.

Every interval: what the ranks count goes to the record; if enabled, the policy decides whether a
change pays, the planner makes one, and the rollout puts it in force layer by layer. Never on the
step path: ranks fetch weights in the background, and whatever fails leaves the placement as it was.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cluster.config import EplbConfig
from cluster.draft_aside import Drafting, draft_aside
from cluster.load_watch import LoadWatch
from cluster.mover import Counters, Mover
from cluster.ranks import Rank, RanksError
from cluster.rebalance_draft import Draft, worthwhile
from cluster.rollout import Leaders, Rollout
from cluster.server.errors import Code, RequestError
from router.load import ExpertLoad, LoadWindow
from router.placement import Placement
from router.policy import Decision, Policy, PolicyOptions
from router.split import resplit_optima

PLAN_TIMEOUT_S = 300.0
MAX_PAUSE_S = 300.0

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ExpertFacts:
    """What of the model matters here. Layer i of a placement is `model_layers[i]` of the model."""

    model_layers: tuple[int, ...]
    experts_per_token: int
    expert_bytes: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Outcome:
    """What came of asking for a rebalance; `epoch` was in force when it was planned."""

    started: bool
    epoch: int
    draft: Draft


class Rebalancer:
    """`start`, then it watches until `stop`. For one event loop."""

    def __init__(
        self,
        config: EplbConfig,
        facts: ExpertFacts,
        placement: Placement,
        ranks: Sequence[Rank],
        leaders: Leaders,
        make_draft: Drafting = draft_aside,
    ) -> None:
        self.facts = facts
        self.loads = LoadWatch(
            ranks,
            LoadWindow(placement.num_layers, placement.num_experts, horizon=config.window_size),
            experts_per_token=facts.experts_per_token,
        )
        self._config = config
        self._policy = Policy(
            PolicyOptions(
                threshold=config.threshold,
                target=config.target,
                horizon_s=config.horizon_s,
                bytes_per_expert=facts.expert_bytes,
                bandwidth=config.bandwidth_mib_s * 2**20,
            )
        )
        rollout = Rollout(ranks, leaders, config.prepare_timeout_s, placement.epoch)
        self._mover = Mover(placement, rollout, facts.model_layers)
        self._make_draft = make_draft
        self._watching: asyncio.Task[None] | None = None
        self._acting: asyncio.Task[None] | None = None
        self._planning = asyncio.Lock()
        self._verdict = "not enough load recorded yet"

    # Life ---------------------------------------------------------------------------------------

    def start(self) -> None:
        self._watching = asyncio.create_task(self._watch(), name="rebalancer-watch")
        self._watching.add_done_callback(self._on_watch_ended)

    async def stop(self) -> None:
        """Returns when nothing of it runs any more."""
        tasks = [task for task in (self._watching, self._acting) if task]
        self._watching = None
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._mover.stop()

    @property
    def placement(self) -> Placement:
        """In force at every replica."""
        return self._mover.placement

    @property
    def counters(self) -> Counters:
        return self._mover.counters

    @property
    def state(self) -> str:
        """Whether experts move by themselves, or why not."""
        if self._watching is None:
            return "off: not watching the ranks"
        if self._watching.done():
            return (
                f"off: the watch ended unasked ({self.counters.last_error}); see the server's log"
            )
        if not self._config.enabled:
            return "off: eplb_config.enabled is false"
        if pause_s := self._pause_s():
            return f"on, pausing {pause_s:.0f} s after failure {self.counters.failures} in a row"
        return f"on: {self._verdict}"

    @property
    def running(self) -> bool:
        """Whether experts are moving."""
        return self._mover.running

    # For operators ------------------------------------------------------------------------------

    async def rebalance(
        self, *, dry_run: bool = False, target: float | None = None, from_scratch: bool = False
    ) -> Outcome:
        """Plan for the recorded load now and, unless `dry_run`, start to move experts.

        Raises RequestError (FAILED_PRECONDITION) if nothing can be planned, or, unless `dry_run`,
        while another rebalance is running.
        """
        target = target or self._config.target
        if dry_run:
            drafted = await self._draft(target, from_scratch)
            return Outcome(started=False, epoch=self.placement.epoch, draft=drafted)
        async with self._planning:
            if self.running:
                raise _precondition(f"a rebalance is running: {self.counters.doing}")
            drafted = await self._draft(target, from_scratch)
            epoch = self.placement.epoch
            if drafted.rows:
                self._mover.begin(drafted, "asked for by an operator")
        return Outcome(started=bool(drafted.rows), epoch=epoch, draft=drafted)

    async def planned_balancedness(self) -> list[float]:
        """[L]: mean / max over ranks of the recorded load under the placement in force; 0: none yet."""
        load = self.loads.load()
        if load is None:
            return [0.0] * self.placement.num_layers
        optima_L = await asyncio.to_thread(resplit_optima, load.mean_LE, self.placement)
        return [1 / optimum for optimum in optima_L.tolist()]

    async def _draft(self, target: float, from_scratch: bool) -> Draft:
        if self.placement.num_ranks == 1:
            raise _precondition("there is one rank only: no other could hold its experts")
        load = self.loads.load()
        if load is None or self.loads.num_tokens < self._config.min_tokens:
            raise _precondition(
                f"not enough load recorded yet: {self.loads.num_tokens} tokens of "
                f"eplb_config.min_tokens = {self._config.min_tokens}"
            )
        return await self._plan(load, target=target, from_scratch=from_scratch)

    async def _plan(self, load: ExpertLoad, **options: Any) -> Draft:
        try:
            async with asyncio.timeout(PLAN_TIMEOUT_S):
                return await self._make_draft(
                    load, self.placement, node_traffic=self._config.node_traffic, **options
                )
        except TimeoutError:
            raise RequestError(
                Code.DEADLINE_EXCEEDED, f"no plan was made within {PLAN_TIMEOUT_S:g} s"
            ) from None

    # The watch ----------------------------------------------------------------------------------

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(self._config.interval_s)
            try:
                await self.loads.look()
                self._mover.adopt()
                if self._config.enabled:
                    await self._consider()
            except RanksError as error:
                if str(error) != self.counters.last_error:
                    logger.warning("rebalancer: %s", error)
                self.counters.last_error = str(error)
            except Exception as error:
                # One bad look must not end the watch; that it happened must not be hidden.
                self.counters.fail(f"{type(error).__name__}: {error}")
                logger.exception("rebalancer: unexpected")

    async def _consider(self) -> None:
        """Ask the policy, and begin what it wants."""
        load = self.loads.load()
        if load is None or self.loads.num_tokens < self._config.min_tokens or self._pause_s():
            return
        if self.running or self._planning.locked():
            return
        decision = await asyncio.to_thread(self._policy.decide, self.loads.window, self.placement)
        self._verdict = decision.reason
        if decision.rebalance:
            # Beside the watch, which goes on while a plan is made.
            self._acting = asyncio.create_task(self._act(load, decision), name="rebalancer-act")

    async def _act(self, load: ExpertLoad, decision: Decision) -> None:
        try:
            async with self._planning:
                if self.running:
                    return
                drafted = await self._plan(load, target=self._config.target, only=decision.layers)
                drafted = worthwhile(drafted, self._policy, self.placement)
                if drafted.rows:
                    self._mover.begin(drafted, decision.reason)
                else:
                    self._verdict = f"no plan pays for its moves: {decision.reason}"
        except Exception as error:
            self.counters.fail(f"{type(error).__name__}: {error}")
            logger.exception("rebalancer: no plan")

    def _pause_s(self) -> float:
        """Seconds left of the pause after failures: twice as long after each in a row."""
        failures = min(self.counters.failures, 20)
        pause_s = min(MAX_PAUSE_S, self._config.interval_s * 2**failures) if failures else 0.0
        return max(0.0, self.counters.failed_at + pause_s - time.monotonic())

    def _on_watch_ended(self, task: asyncio.Task[None]) -> None:
        if self._watching is not task:
            return  # stopped
        cause = "cancelled" if task.cancelled() else repr(task.exception())
        self.counters.last_error = f"the watch ended: {cause}"
        logger.error("rebalancer: the watch ended unasked: %s", cause)


def _precondition(message: str) -> RequestError:
    return RequestError(Code.FAILED_PRECONDITION, message)
