"""One layer's new slots, put in force by all ranks on the same step, or by none.

    prepare on every rank  --all did-->  commit to the leaders  --> every replica reports the epoch
             | one failed, was lost or took too long
             v
    abandon on every rank: the old slots were never out of force

A rank prepares in the background: it fetches the weights that it will need. After the commit there
is no way back: all ranks have everything, and change over at the next step that they agree on.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from typing import Protocol

from cluster.ranks import Rank, RanksError, ask_all

ABANDON_TIMEOUT_S = 10.0
RESEND_S = 1.0
_POLL_S = 0.01

logger = logging.getLogger(__name__)


class Leaders(Protocol):
    """The replicas' leaders, as the gateway knows them."""

    def commit_placement(self, epoch: int) -> None:
        """Tell every leader that all ranks have prepared `epoch`; wakes those that sleep."""

    def placement_epochs(self) -> list[int]:
        """The epoch in force at each replica, as last reported."""


class Rollout:
    """Changes one layer at a time: `prepare`, then `commit`. Both raise RanksError.

    After a failed `prepare` the old slots are in force. After a failed `commit` it is only late:
    `in_force` tells when the new ones are, and `prepare` refuses the next change until then.
    """

    def __init__(
        self, ranks: Sequence[Rank], leaders: Leaders, timeout_s: float, epoch: int = 0
    ) -> None:
        self._ranks = ranks
        self._leaders = leaders
        self._timeout_s = timeout_s
        self._committed = epoch
        self._left: int | None = None
        """An epoch that a rank may have prepared although it was not committed."""

    async def prepare(self, epoch: int, layer: int, row: Sequence[int]) -> None:
        """Have all ranks get what they need for `epoch`, in which `layer` has the slots `row`."""
        if not self.in_force(self._committed):
            raise RanksError(self._unconfirmed())
        if self._left is not None:
            # What a rank still has of it must not be taken for what is prepared now.
            await self._abandon(self._left)
        self._left = epoch
        try:
            await ask_all(
                self._ranks,
                lambda rank: rank.prepare(epoch, layer, row),
                f"prepared epoch {epoch} (expert layer {layer})",
                self._timeout_s,
            )
        except RanksError:
            try:
                await self._abandon(epoch)
            except RanksError as error:
                logger.warning("%s", error)
            raise

    async def commit(self, epoch: int) -> None:
        """All ranks have prepared `epoch`: returns once every replica reports it in force."""
        self._committed, self._left = epoch, None
        deadline = time.monotonic() + self._timeout_s
        sent = -RESEND_S
        while not self.in_force(epoch):
            now = time.monotonic()
            if now > deadline:
                raise RanksError(f"{self._unconfirmed()} within {self._timeout_s:g} s")
            if now - sent >= RESEND_S:
                self._leaders.commit_placement(epoch)
                sent = now
            await asyncio.sleep(_POLL_S)

    def in_force(self, epoch: int) -> bool:
        """Whether every replica has reported `epoch` or a later one."""
        return all(at >= epoch for at in self._leaders.placement_epochs())

    async def _abandon(self, epoch: int) -> None:
        await ask_all(
            self._ranks,
            lambda rank: rank.abandon(epoch),
            f"confirmed that epoch {epoch} is abandoned",
            ABANDON_TIMEOUT_S,
        )
        self._left = None

    def _unconfirmed(self) -> str:
        epochs = self._leaders.placement_epochs()
        late = ", ".join(str(replica) for replica, at in enumerate(epochs) if at < self._committed)
        return f"epoch {self._committed} was committed, but replica {late} has not reported it"
