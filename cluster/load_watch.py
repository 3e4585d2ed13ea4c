"""Asks the ranks what their experts had to do, and keeps what plans and people need of it."""

from __future__ import annotations

import time
from collections.abc import Sequence

from cluster.balance_record import BalanceRecord, Look, sampled_rows
from cluster.ranks import Rank, ask_all
from router.load import ExpertLoad, LoadWindow
from router.load_files import dump_window

LOOK_TIMEOUT_S = 10.0


class LoadWatch:
    """`look` now and then. `record` is for people, `window` for the policy and the planner."""

    def __init__(
        self, ranks: Sequence[Rank], window: LoadWindow, *, experts_per_token: int
    ) -> None:
        self.record = BalanceRecord()
        self.window = window
        self._ranks = ranks
        self._experts_per_token = experts_per_token

    async def look(self) -> None:
        """Take in what has happened since the last look; raises RanksError."""
        reports = await ask_all(
            self._ranks, lambda rank: rank.expert_stats(), "reported its experts", LOOK_TIMEOUT_S
        )
        counts_LE = self.record.add(Look.of(reports, time.monotonic()))
        self.window.add(counts_LE, sampled_rows(reports))

    @property
    def num_tokens(self) -> int:
        """In the window, old ones counting less."""
        return round(self.window.num_tokens / self._experts_per_token)

    def load(self) -> ExpertLoad | None:
        """What plans would be made for; None before the first tokens."""
        return self.window.estimate() if self.window.num_tokens else None

    def dump(self) -> bytes:
        """The window as a file, for `router.load_files.read_window`."""
        return dump_window(self.window)
