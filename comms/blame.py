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
    """Ranks on my chain that left no note so far and still may."""
    ranks = chain(mine.needs, notes)
    told = [mine, *(notes[rank] for rank in ranks if rank in notes)]
    ended = {rank for note in told if note.ended for rank in note.needs}
    return [rank for rank in ranks if rank not in notes and rank not in ended]


def because(mine: Note, me: int, notes: Mapping[int, Note]) -> str:
    """What the ranks that I needed were waiting for themselves; "" if none of them said."""
    others = {rank: note for rank, note in notes.items() if rank != me}
    ranks = chain(mine.needs, others)
    told = [rank for rank in ranks if rank in others]
    if not told:
        return ""
    sentences = [others[rank].text for rank in told]
    late = {need for rank in told if others[rank].late for need in others[rank].needs}
    silent = [rank for rank in ranks if rank in late and rank not in others and rank != me]
    if silent:
        sentences.append(f"{ranks_text(silent)} never answered")
    elif circle := _circle(ranks, {**others, me: mine}):
        gave_up = [rank for rank in circle if not {**others, me: mine}[rank].late]
        if gave_up:  # it came when the others had given up on it
            sentences.append(f"{ranks_text(gave_up)} came late")
        else:
            sentences.append(f"{ranks_text(sorted(circle))} wait for each other")
    return "; ".join(sentences)


def _circle(ranks: Sequence[int], notes: Mapping[int, Note]) -> list[int]:
    """The ranks whose chain leads back to themselves."""
    return [r for r in ranks if r in notes and r in chain(notes[r].needs, notes)]
