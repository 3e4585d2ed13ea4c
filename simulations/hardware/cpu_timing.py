"""Seconds of a call while all ranks of this machine make the same call, as they do in a step.

Ranks outnumber cores on a small machine, so a call is timed by the mean over a window that is longer
than a time slice. All cases are timed in rounds, so that no case falls wholly into a busy moment, and
the result is the lower quartile over windows and ranks: what else runs only ever adds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter

import numpy as np

from comms.groups import Group

Call = Callable[[], object]

LOCKSTEP_CALLS = 25


@dataclass(frozen=True, kw_only=True)
class Windows:
    """How long and how often each case is timed: `number` times in each round."""

    seconds: float = 0.02
    number: int = 2
    rounds: int = 6


def window_means(calls: Sequence[Call], world: Group, windows: Windows) -> list[float]:
    """Seconds of one call in each window; `calls` do the same work on different memory, in turns.

    Collective only in that all ranks start together.
    """
    for call in calls:
        call()
    world.barrier()
    once_s = _seconds(calls, len(calls)) / len(calls)
    number = max(len(calls), round(windows.seconds / once_s))
    world.barrier()
    return [_seconds(calls, number) / number for _ in range(windows.number)]


def lockstep_means(call: Call, world: Group, windows: Windows) -> list[float]:
    """The same for a collective call, of which every rank must make equally many."""
    for _ in range(3):
        call()
    world.barrier()
    return [_seconds([call], LOCKSTEP_CALLS) / LOCKSTEP_CALLS for _ in range(windows.number)]


def undisturbed(by_rank: Sequence[Sequence[float]]) -> float:
    """Of the windows of all ranks."""
    return float(np.quantile(np.asarray(by_rank), 0.25))


def _seconds(calls: Sequence[Call], number: int) -> float:
    start = perf_counter()
    for i in range(number):
        calls[i % len(calls)]()
    return perf_counter() - start
