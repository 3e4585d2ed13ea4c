"""The sequences that wait for their turn, the most urgent first."""

from bisect import bisect_left, insort
from collections.abc import Iterator

from cluster.engine.sequence import Sequence


class WaitingQueue:
    """In order of urgency (`Sequence.urgency`): by priority, then by arrival."""

    def __init__(self) -> None:
        self._order: list[tuple[int, int]] = []
        self._sequences: dict[int, Sequence] = {}

    def __len__(self) -> int:
        return len(self._order)

    def __iter__(self) -> Iterator[Sequence]:
        return (self._sequences[seq_id] for _, seq_id in self._order)

    def __contains__(self, sequence: Sequence) -> bool:
        return sequence.seq_id in self._sequences

    @property
    def first(self) -> Sequence:
        """The most urgent; IndexError when nobody waits."""
        return self._sequences[self._order[0][1]]

    def push(self, sequence: Sequence) -> None:
        insort(self._order, sequence.urgency)
        self._sequences[sequence.seq_id] = sequence

    def remove(self, sequence: Sequence) -> None:
        """KeyError when it does not wait."""
        del self._sequences[sequence.seq_id]
        del self._order[bisect_left(self._order, sequence.urgency)]
