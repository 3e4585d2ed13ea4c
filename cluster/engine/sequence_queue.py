"""Sequences in order of urgency: by priority, then by arrival."""

from bisect import bisect_left, insort
from collections.abc import Iterator

from cluster.engine.sequence import Sequence


class SequenceQueue:
    """Each at most once. `push` and `remove` cost a search and a small move of memory."""

    def __init__(self) -> None:
        self._order: list[tuple[int, int, Sequence]] = []
        self._by_id: dict[int, Sequence] = {}

    def __len__(self) -> int:
        return len(self._order)

    def __iter__(self) -> Iterator[Sequence]:
        """The most urgent first; the queue may be changed meanwhile."""
        return iter([sequence for _, _, sequence in self._order])

    def __contains__(self, sequence: Sequence) -> bool:
        return sequence.seq_id in self._by_id

    def __getitem__(self, seq_id: int) -> Sequence:
        """KeyError when it is not here."""
        return self._by_id[seq_id]

    @property
    def first(self) -> Sequence:
        """The most urgent; IndexError when there is none."""
        return self._order[0][2]

    @property
    def last(self) -> Sequence:
        """The least urgent; IndexError when there is none."""
        return self._order[-1][2]

    def push(self, sequence: Sequence) -> None:
        self._by_id[sequence.seq_id] = sequence
        insort(self._order, (*sequence.urgency, sequence))

    def remove(self, sequence: Sequence) -> None:
        """KeyError when it is not here."""
        del self._by_id[sequence.seq_id]
        del self._order[bisect_left(self._order, sequence.urgency)]
