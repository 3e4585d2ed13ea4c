"""Changes of the placement as a script wants them: what the rebalancer does, without a cluster.

Every rank prepares in a thread of its own while the engine steps. A counter in the store tells when
all have, and then each leader gets the frame that the gateway would send.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from types import TracebackType
from typing import NamedTuple

from cluster.engine.mailbox import LocalMailbox
from cluster.engine.runner import Runner
from comms.groups import ParallelGroups
from comms.store import TCPStore, connect_store
from experts.migrate import MigrationError

_POLL_S = 0.002


class Change(NamedTuple):
    """`row`, the experts of all slots of one expert layer, once the rank has made so many steps."""

    after_step: int
    layer: int
    row: Sequence[int]


class Script:
    """One rank's part in the changes, followed in the background inside a `with` block.

    A change is taken from `changes` once the one before is in force. `mailbox` on leaders only.
    `failure` says what went wrong, if anything.
    """

    def __init__(
        self,
        changes: Iterable[Change],
        runner: Runner,
        mailbox: LocalMailbox | None,
        groups: ParallelGroups,
        store_address: str,
    ) -> None:
        self.failure = ""
        self._changes, self._runner, self._mailbox = changes, runner, mailbox
        self._groups, self._store_address = groups, store_address
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="scripted-changes", daemon=True)

    def __enter__(self) -> Script:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()
        with suppress(MigrationError):  # committed: it only did not get its step any more
            self._runner.abandon(self._runner.epoch + 1)
        self._thread.join()

    def _run(self) -> None:
        if not self._changes:
            return
        store = connect_store(self._store_address)
        try:
            for epoch, change in enumerate(self._changes, self._runner.epoch + 1):
                self._make(store, epoch, change)
        except (MigrationError, ValueError) as error:
            self.failure = str(error)

    def _make(self, store: TCPStore, epoch: int, change: Change) -> None:
        world_size = self._groups.topology.world_size
        prepared = f"{self._groups.epoch}/prepared/{epoch}"
        self._until(lambda: self._runner.num_steps >= change.after_step)
        self._runner.prepare(epoch, change.layer, change.row)
        store.add(prepared, 1)
        if self._mailbox is not None:
            self._until(lambda: store.add(prepared, 0) == world_size)
            self._mailbox.post({"type": "placement", "epoch": epoch})
        self._until(lambda: self._runner.epoch == epoch)

    def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            if self._ended.wait(_POLL_S):
                raise MigrationError("the requests ended before the script did")
