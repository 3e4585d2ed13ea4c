"""Errors that say who is to blame, not merely who was waited for.

A rank that fails leaves a note in the store: whom it waited for, and in what. A rank that waited for
*it* reads the note, so that its own error can name the peer that started it all. The store may be
out of reach itself, and a call to it then blocks: so notes pass in a thread of their own, over a
connection of their own, and nobody waits for them longer than `NOTES_S`.
"""

import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress

from comms.blame import Note, because, chain, ranks_text, unheard
from comms.group import CommError, CommTimeout
from comms.store import Store
from comms.where import Where

NOTES_S = 0.5  # peers that wait for the same rank fail at about the same time
_POLL_S = 0.02


class Diagnosis:
    """Makes the errors of one rank's groups; one per rank and epoch."""

    def __init__(self, store: Store, rank: int, where: Where) -> None:
        self._store, self._rank, self._where = store, rank, where
        self._noted = False
        self._messenger: threading.Thread | None = None

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
        what = f"rank {self._rank} waited for {ranks_text(silent)}"
        note = self._note(what, f"in {operation} of {group!r}", silent, late=True)
        return CommTimeout(
            group=group,
            operation=operation,
            rank=self._rank,
            silent=silent,
            deadline_s=deadline_s,
            where=str(self._where),
            progress=progress,
            because=self._because(note),
        )

    def lost(
        self,
        *,
        group: str,
        operation: str,
        peers: Sequence[int],
        reason: str,
        ended: bool = False,
    ) -> CommError:
        """The error for peers whose process or connection is gone, or that aborted.

        Takes at most half a second; no time where the processes are known to have `ended`.
        Call it before the failure shows to others: they look for my note when they see it.
        """
        what = f"rank {self._rank} lost {ranks_text(peers) or 'a peer'} in {operation}"
        note = self._note(what, f"of {group!r}: {reason}", peers, ended=ended)
        why = self._because(note)
        return self._error(group, f"{what}: {reason}" + (f"; {why}" if why else ""))

    def disagreed(self, *, group: str, reason: str) -> CommError:
        """The error for members that called different things, as `reason` says."""
        note = self._note(reason, f"in {group!r}", ())
        self._because(note)
        return self._error(group, reason)

    def _error(self, group: str, text: str) -> CommError:
        where = f"{self._where}, " if str(self._where) else ""
        return CommError(f"{where}group {group!r}: {text}")

    def _note(
        self,
        what: str,
        context: str,
        needs: Sequence[int],
        *,
        late: bool = False,
        ended: bool = False,
    ) -> Note:
        where = f" ({self._where})" if str(self._where) else ""
        return Note(text=f"{what} {context}{where}", needs=tuple(needs), late=late, ended=ended)

    # -- notes -------------------------------------------------------------------------------

    def _because(self, mine: Note) -> str:
        """Leave my note, read those that it leads to, and say what they tell."""
        notes: dict[int, Note] = {}
        if self._messenger is None or not self._messenger.is_alive():  # else the store hangs
            self._messenger = threading.Thread(
                target=self._pass_notes, args=(mine, notes), name="expertmesh-notes", daemon=True
            )
            self._messenger.start()
            self._messenger.join(NOTES_S)
        return because(mine, self._rank, dict(notes))

    def _pass_notes(self, mine: Note, notes: dict[int, Note]) -> None:
        deadline = time.monotonic() + NOTES_S
        with suppress(RuntimeError):  # the store is gone: the error is raised without notes
            store = self._store.clone()  # type: ignore[attr-defined]  # missing in torch's stub
            if not self._noted:  # what failed first explains what failed later
                store.set(f"note/{self._rank}", mine.pack())
                self._noted = True
            while True:
                self._read_notes(store, mine, notes)
                if not unheard(mine, notes) or time.monotonic() > deadline:
                    return
                time.sleep(_POLL_S)

    def _read_notes(self, store: Store, mine: Note, notes: dict[int, Note]) -> None:
        """All notes on my chain that are there by now; each may lead on to others."""
        looked: set[int] = set()
        while to_look := [
            r for r in chain(mine.needs, notes) if r not in looked and r not in notes
        ]:
            for rank in to_look:
                if store.check([f"note/{rank}"]):
                    notes[rank] = Note.unpack(store.get(f"note/{rank}"))
            looked.update(to_look)
