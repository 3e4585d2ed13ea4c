"""Which of several choices nothing else beats, where more is better in two ways."""

from collections.abc import Sequence

Pair = tuple[float, float]


def front_of(pairs: Sequence[Pair]) -> list[Pair]:
    """Those that no other is at least as good as in both ways and better in one; by the first."""
    best: list[Pair] = []
    for pair in sorted(set(pairs), reverse=True):
        if not best or pair[1] > best[-1][1]:
            best.append(pair)
    return best[::-1]
