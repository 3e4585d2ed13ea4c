"""Carries a rebalance out, layer by layer in the background, and knows the placement in force."""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass

from cluster.ranks import RanksError
from cluster.rebalance_draft import Draft
from cluster.rollout import Rollout
from router.placement import IntArray, Placement

logger = logging.getLogger(__name__)


@dataclass
class Counters:
    """Since the start. An abandoned rebalance keeps the layers that it had changed before."""

    started: int = 0
    finished: int = 0
    abandoned: int = 0
    moves: int = 0
    seconds: float = 0.0
    doing: str = ""
    last_reason: str = ""
    last_error: str = ""
    failures: int = 0
    """In a row, up to now."""
    failed_at: float = 0.0
    """`time.monotonic()` of the latest."""

    def fail(self, reason: str) -> None:
        self.last_error = reason
        self.failures += 1
        self.failed_at = time.monotonic()


class Mover:
    """One rebalance at a time: `begin`, and `running` until it has finished or was abandoned."""

    def __init__(
        self, placement: Placement, rollout: Rollout, model_layers: tuple[int, ...]
    ) -> None:
        self.placement = placement
        self.counters = Counters()
        self._rollout = rollout
        self._model_layers = model_layers
        self._committed = placement
        """In force or about to be: not yet `placement` while replicas have not reported it."""
        self._task: asyncio.Task[None] | None = None

    @property
    def running(self) -> bool:
        return self._task is not None and not self._task.done()

    def begin(self, draft: Draft, reason: str) -> None:
        """Start to move what the draft, made from `placement`, says."""
        assert not self.running, "one at a time"
        self.counters.started += 1
        self.counters.last_reason = reason
        self._task = asyncio.create_task(self._move(draft), name="rebalance")

    def adopt(self) -> None:
        """A committed placement is shown and planned from once every replica reports it."""
        if self._rollout.in_force(self._committed.epoch):
            self.placement = self._committed

    async def stop(self) -> None:
        """Returns when nothing runs any more; a change that was not committed is left as it is."""
        if self._task:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _move(self, draft: Draft) -> None:
        counters, began = self.counters, time.monotonic()
        moves = {effect.layer: effect.moves for effect in draft.effects}
        try:
            for number, (layer, row) in enumerate(draft.rows, 1):
                counters.doing = (
                    f"layer {self._model_layers[layer]} ({number} of {len(draft.rows)}), "
                    f"experts to move: {moves[layer]}"
                )
                await self._change(layer, row)
                counters.moves += moves[layer]
        except RanksError as error:
            counters.abandoned += 1
            counters.fail(str(error))
            logger.warning("rebalance abandoned: %s", error)
        except Exception as error:
            counters.abandoned += 1
            counters.fail(f"{type(error).__name__}: {error}")
            logger.exception("rebalance abandoned")
        else:
            counters.finished += 1
            counters.failures = 0
        finally:
            counters.seconds += time.monotonic() - began
            counters.doing = ""

    async def _change(self, layer: int, row: IntArray) -> None:
        changed = self.placement.with_layers({layer: row})
        await self._rollout.prepare(changed.epoch, layer, row.tolist())
        self._committed = changed
        await self._rollout.commit(changed.epoch)
        self.adopt()
