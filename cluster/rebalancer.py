"""Watches the experts' load and keeps the placement fit for it, while the cluster serves.

Every interval: what the ranks count goes to the record; if enabled, the policy decides whether a
change pays, the planner makes one, and the rollout puts it in force layer by layer. Never on the
step path: ranks fetch weights in the background, and whatever fails leaves the placement as it was.
"""

from __future__ import annotations

import asyncio
import io
import logging
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import numpy as np

from cluster.balance_record import BalanceRecord, Look, sampled_rows
from cluster.config import EplbConfig
from cluster.ranks import Rank, RanksError, ask_all
from cluster.rebalance_draft import Draft, draft, imbalances
from cluster.rollout import Leaders, Rollout
from cluster.server.errors import Code, RequestError
from router.load import ExpertLoad, LoadWindow
from router.placement import IntArray, Placement
from router.policy import Policy, PolicyOptions

LOOK_TIMEOUT_S = 10.0
MAX_PAUSE_S = 300.0

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ExpertFacts:
    """What of the model matters here. Layer i of a placement is `model_layers[i]` of the model."""

    model_layers: tuple[int, ...]
    experts_per_token: int
    expert_bytes: int


@dataclass
class Counters:
    """Since the start. A rebalance that was given up keeps the layers that it had changed."""

    started: int = 0
    finished: int = 0
    abandoned: int = 0
    moves: int = 0
    seconds: float = 0.0
    doing: str = ""
    last_reason: str = ""
    last_error: str = ""


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
    ) -> None:
        self.facts = facts
        self.placement = placement
        self.record = BalanceRecord()
        self.counters = Counters()
        self._config = config
        self._ranks = ranks
        self._window = LoadWindow(
            placement.num_layers, placement.num_experts, horizon=config.window_size
        )
        self._policy = Policy(
            PolicyOptions(
                threshold=config.threshold,
                target=config.target,
                horizon_s=config.horizon_s,
                bytes_per_expert=facts.expert_bytes,
                bandwidth=config.bandwidth_mib_s * 2**20,
            )
        )
        self._rollout = Rollout(ranks, leaders, config.prepare_timeout_s, placement.epoch)
        self._committed = placement
        """In force or about to be: not yet `placement` while replicas have not reported it."""
        self._watching: asyncio.Task[None] | None = None
        self._moving: asyncio.Task[None] | None = None
        self._planning = asyncio.Lock()
        self._failures = 0
        self._pause_until = 0.0

    # Life ---------------------------------------------------------------------------------------

    def start(self) -> None:
        self._watching = asyncio.create_task(self._watch(), name="rebalancer-watch")
        self._watching.add_done_callback(self._on_watch_ended)

    async def stop(self) -> None:
        """Returns when nothing of it runs any more; a change that was not committed is left."""
        tasks = [task for task in (self._watching, self._moving) if task]
        self._watching = None
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

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
        left_s = self._pause_until - time.monotonic()
        if left_s > 0:
            return f"on, pausing {left_s:.0f} s after failure {self._failures}"
        return "on: eplb_config.enabled is true"

    @property
    def running(self) -> bool:
        """Whether a rebalance is being planned or under way."""
        moving = self._moving is not None and not self._moving.done()
        return moving or self._planning.locked()

    @property
    def tokens_recorded(self) -> int:
        return round(self._window.num_tokens / self.facts.experts_per_token)

    # For operators ------------------------------------------------------------------------------

    async def rebalance(
        self, *, dry_run: bool = False, target: float | None = None, from_scratch: bool = False
    ) -> Outcome:
        """Plan for the recorded load now and, unless `dry_run`, start to move experts.

        Raises RequestError (FAILED_PRECONDITION) if nothing can be planned, or, unless `dry_run`,
        while another rebalance is running.
        """
        if self.running and not dry_run:
            doing = self.counters.doing or "planning"
            raise _precondition(f"a rebalance is running: {doing}; wait for its end")
        load = self._checked_load()
        epoch = self.placement.epoch
        async with nullcontext() if dry_run else self._planning:
            planned = await asyncio.to_thread(
                draft,
                load,
                self.placement,
                target=target or self._config.target,
                from_scratch=from_scratch,
            )
            started = bool(planned.rows) and not dry_run
            if started:
                self._begin(planned, "asked for by an operator")
        return Outcome(started=started, epoch=epoch, draft=planned)

    async def planned_balancedness(self) -> list[float]:
        """[L]: mean / max over ranks of the recorded load under the placement in force; 0: none yet."""
        load = self.load()
        if load is None:
            return [0.0] * self.placement.num_layers
        found = await asyncio.to_thread(imbalances, load, self.placement)
        return [1 / imbalance for imbalance in found]

    def load(self) -> ExpertLoad | None:
        """What plans would be made for; None before the first tokens."""
        return self._window.estimate() if self._window.num_tokens else None

    def recorded(self) -> bytes:
        """The load window as an .npz file (see `LoadWindow.from_state`)."""
        file = io.BytesIO()
        np.savez_compressed(file, allow_pickle=False, **self._window.state())
        return file.getvalue()

    def _checked_load(self) -> ExpertLoad:
        if self.placement.num_ranks == 1:
            raise _precondition("there is one rank only: no other could hold its experts")
        load = self.load()
        if load is None or self.tokens_recorded < self._config.min_tokens:
            raise _precondition(
                f"not enough load recorded yet: {self.tokens_recorded} tokens of "
                f"eplb_config.min_tokens = {self._config.min_tokens}"
            )
        return load

    # The watch ----------------------------------------------------------------------------------

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(self._config.interval_s)
            try:
                await self._look()
                if self._config.enabled and not self.running:
                    await self._consider()
            except RanksError as error:
                if str(error) != self.counters.last_error:
                    logger.warning("rebalancer: %s", error)
                self.counters.last_error = str(error)
            except Exception as error:
                # One bad look must not end the watch; that it happened must not be hidden.
                self._note_failure(f"{type(error).__name__}: {error}")
                logger.exception("rebalancer: unexpected")

    async def _look(self) -> None:
        reports = await ask_all(
            self._ranks, lambda rank: rank.expert_stats(), "reported its experts", LOOK_TIMEOUT_S
        )
        counts_LE = self.record.add(Look.of(reports, time.monotonic()))
        self._window.add(counts_LE, sampled_rows(reports))
        self._adopt()

    async def _consider(self) -> None:
        """Ask the policy, and begin what it wants."""
        load = self.load()
        enough = self.tokens_recorded >= self._config.min_tokens
        if load is None or not enough or time.monotonic() < self._pause_until:
            return
        async with self._planning:
            decision = await asyncio.to_thread(self._policy.decide, self._window, self.placement)
            self.counters.last_reason = decision.reason
            if not decision.rebalance:
                return
            planned = await asyncio.to_thread(
                draft, load, self.placement, target=self._config.target, only=decision.layers
            )
            worthwhile = self._worthwhile(planned)
            if worthwhile.rows:
                self._begin(worthwhile, decision.reason)
            elif planned.rows:
                self.counters.last_reason = f"no plan pays for its moves: {decision.reason}"

    def _worthwhile(self, planned: Draft) -> Draft:
        """Without the layers whose moves cost more than they bring."""
        num_layers, num_ranks = self.placement.num_layers, self.placement.num_ranks
        pays = {
            effect.layer
            for effect in planned.effects
            if self._policy.pays(
                effect.imbalance_before, effect.imbalance_after, effect.moves, num_layers, num_ranks
            )
        }
        return replace(planned, rows=tuple(row for row in planned.rows if row[0] in pays))

    def _on_watch_ended(self, task: asyncio.Task[None]) -> None:
        if self._watching is not task:
            return  # stopped
        cause = "cancelled" if task.cancelled() else repr(task.exception())
        self.counters.last_error = f"the watch ended: {cause}"
        logger.error("rebalancer: the watch ended unasked: %s", cause)

    # Moving -------------------------------------------------------------------------------------

    def _begin(self, planned: Draft, reason: str) -> None:
        self.counters.started += 1
        self.counters.last_reason = reason
        self._moving = asyncio.create_task(self._move(planned), name="rebalancer-move")

    async def _move(self, planned: Draft) -> None:
        began = time.monotonic()
        moves = {effect.layer: effect.moves for effect in planned.effects}
        try:
            for number, (layer, row) in enumerate(planned.rows, 1):
                self.counters.doing = (
                    f"layer {self.facts.model_layers[layer]} ({number} of {len(planned.rows)}), "
                    f"{moves[layer]} experts move"
                )
                await self._change(layer, row)
                self.counters.moves += moves[layer]
        except RanksError as error:
            self.counters.abandoned += 1
            self._note_failure(str(error))
            logger.warning("rebalance abandoned: %s", error)
        except Exception as error:
            self.counters.abandoned += 1
            self._note_failure(f"{type(error).__name__}: {error}")
            logger.exception("rebalance abandoned")
        else:
            self.counters.finished += 1
            self._failures = 0
        finally:
            self.counters.seconds += time.monotonic() - began
            self.counters.doing = ""

    async def _change(self, layer: int, row: IntArray) -> None:
        changed = self.placement.with_layers({layer: row})
        await self._rollout.prepare(changed.epoch, layer, row.tolist())
        self._committed = changed
        await self._rollout.commit(changed.epoch)
        self._adopt()

    def _adopt(self) -> None:
        """A committed placement is shown and planned from once every replica reports it."""
        if self._rollout.in_force(self._committed.epoch):
            self.placement = self._committed

    def _note_failure(self, reason: str) -> None:
        """Pause, twice as long after each failure in a row."""
        self._failures += 1
        self.counters.last_error = reason
        pause_s = min(MAX_PAUSE_S, self._config.interval_s * 2**self._failures)
        self._pause_until = time.monotonic() + pause_s


def _precondition(message: str) -> RequestError:
    return RequestError(Code.FAILED_PRECONDITION, message)
