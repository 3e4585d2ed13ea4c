"""Errors that say who is to blame, not merely who was waited for.

A rank that fails leaves a note in the store: whom it waited for, and in what. A rank that waited for
*it* reads the note, so that its own error can name the peer that started it all.
"""

from collections.abc import Mapping, Sequence

from comms.group import CommError, CommTimeout
from comms.store import Store
from comms.where import Where


class Diagnosis:
    """Makes the errors of one rank's groups; one per rank and epoch."""

    def __init__(self, store: Store, rank: int, where: Where) -> None:
        self._store, self._rank, self._where = store, rank, where

    def timed_out(
        self,
        *,
        group: str,
        operation: str,
        silent: Sequence[int],
        deadline_s: float,
        progress: Mapping[int, tuple[int, int | None]] | None = None,
    ) -> CommTimeout:
        """The error for peers that did not arrive in time; takes at most half a second."""
        return CommTimeout(
            group=group,
            operation=operation,
            rank=self._rank,
            silent=silent,
            deadline_s=deadline_s,
            where=str(self._where),
            progress=progress,
        )

    def lost(self, *, group: str, operation: str, peers: Sequence[int], reason: str) -> CommError:
        """The error for peers whose process or connection is gone, or that aborted."""
        where = f"{self._where}, " if str(self._where) else ""
        return CommError(
            f"{where}group {group!r}: rank {self._rank} lost rank(s) {list(peers)} in "
            f"{operation}: {reason}"
        )
