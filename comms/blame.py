"""Who started it: follow the notes of ranks that failed to those that everybody waited for.

A note says which ranks its writer needed when it failed. The end of the chain is to blame: a rank
that left no note, or one whose note needs nobody.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass


@dataclass(frozen=True, kw_only=True)
class Note:
    """What one rank says about its failure."""

    text: str  # a sentence about the writer: "rank 2 waited for rank 3 in barrier of 'rail'"
    needs: tuple[int, ...]  # the ranks without which it could not go on
    late: bool = False  # they did not answer in time; otherwise they were gone, or had given up
    ended: bool = False  # their processes are gone: what they did not write, they never will

    def pack(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def unpack(cls, data: bytes) -> "Note":
        fields = json.loads(data)
        return cls(**{**fields, "needs": tuple(fields["needs"])})


def ranks_text(ranks: Iterable[int]) -> str:
    return ", ".join(f"rank {rank}" for rank in ranks)


def chain(needs: Sequence[int], notes: Mapping[int, Note]) -> list[int]:
    """The ranks that `needs` lead to, themselves first, each once."""
    order = list(dict.fromkeys(needs))
    for rank in order:  # grows while we go
        note = notes.get(rank)
        order.extend(r for r in (note.needs if note else ()) if r not in order)
    return order


def unheard(mine: Note, notes: Mapping[int, Note]) -> list[int]:
    """Ranks on my chain that left no note so far and still may.

    A peer that let go of me (I am not late) had read the notes that it leads to before it did.
    """
    ranks = chain(mine.needs, notes) if mine.late else mine.needs
    told = [mine, *(notes[rank] for rank in ranks if rank in notes)]
    ended = {rank for note in told if note.ended for rank in note.needs}
    return [rank for rank in ranks if rank not in notes and rank not in ended]


def because(mine: Note, me: int, notes: Mapping[int, Note]) -> str:
    """What the ranks that I needed were waiting for themselves; "" if none of them said."""
    others = {rank: note for rank, note in notes.items() if rank != me}
    ranks = chain(mine.needs, others)
    told = {rank: others[rank] for rank in ranks if rank in others}
    if not told:
        return ""
    notes = {**told, me: mine}
    end = _silent_end([rank for rank in ranks if rank not in notes], notes) or _circle(notes)
    return "; ".join([*(note.text for note in told.values()), *end])


def _silent_end(silent: Sequence[int], notes: Mapping[int, Note]) -> list[str]:
    """Chains that end at ranks which left no note."""
    late = [r for r in silent if any(n.late and r in n.needs for n in notes.values())]
    gone = [r for r in silent if any(n.ended and r in n.needs for n in notes.values())]
    mute = [r for r in silent if r not in late and r not in gone]
    return [
        *([f"{ranks_text(late)} never answered"] if late else []),
        *([f"{ranks_text(mute)} did not say why"] if mute else []),
    ]


def _circle(notes: Mapping[int, Note]) -> list[str]:
    """Chains that lead back to themselves."""
    circle = sorted(rank for rank in notes if rank in chain(notes[rank].needs, notes))
    missed = {need for note in notes.values() if note.late for need in note.needs}
    came_late = [rank for rank in circle if rank in missed and not notes[rank].late]
    if came_late:  # when the others had given up on it
        return [f"{ranks_text(came_late)} came late"]
    if circle and all(notes[rank].late for rank in circle):
        return [f"{ranks_text(circle)} wait for each other"]
    return []
