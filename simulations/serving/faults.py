"""Ranks that fail, and what the cluster is assumed to do about it.

A replica is a cache (docs/architecture.md): when a rank is lost its replica's sequences go on
elsewhere, from prompt and emitted tokens, and its experts are served by their other copies. The
step that was under way is done again. Times are of published systems, on GPUs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

REGROUP_S = 6.5
"""From a rank's end until the others have noticed it and built their next groups, and again when it
comes back: SGLang's Elastic EP reports 6.2 to 6.8 s (LMSYS, March 2026). Of our own on CPU, gloo
builds its groups anew in at most 0.53 s; nothing of ours was measured on GPUs."""
RECOVERY_S = 150.0
"""From a rank's end until another process has loaded what it held: the same source gives 120 to 180
s for a restart."""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """Rank `rank` ends at `time_s` and is back, with its weights, `recovery_s` later."""

    time_s: float
    rank: int
    recovery_s: float = RECOVERY_S

    def __post_init__(self) -> None:
        if not (0 <= self.time_s < math.inf and self.rank >= 0):
            raise ValueError(
                f"a rank fails at a time of 0 s or later: got {self.time_s:g} s, rank {self.rank}"
            )
        if not 0 < self.recovery_s < math.inf:
            raise ValueError(f"a recovery takes longer than 0 s, got {self.recovery_s:g} s")

    @property
    def back_s(self) -> float:
        return self.time_s + self.recovery_s

    @staticmethod
    def parse(text: str) -> Fault:
        """`TIME:RANK` or `TIME:RANK:RECOVERY_S`; ValueError otherwise."""
        parts = text.split(":")
        try:
            if len(parts) not in (2, 3):
                raise ValueError("could not convert: so many parts")
            recovery_s = float(parts[2]) if len(parts) == 3 else RECOVERY_S
            return Fault(time_s=float(parts[0]), rank=int(parts[1]), recovery_s=recovery_s)
        except ValueError as error:
            if str(error).startswith(("could not convert", "invalid literal")):
                raise ValueError(
                    f"{text!r} is not TIME:RANK or TIME:RANK:RECOVERY_S, e.g. 30:5 or 30:5:60"
                ) from None
            raise


def check_faults(faults: Sequence[Fault], num_ranks: int) -> tuple[Fault, ...]:
    """In order of time; ValueError for a rank that is not there, or is lost already."""
    ordered = sorted(faults, key=lambda fault: (fault.time_s, fault.rank))
    back: dict[int, float] = {}
    for fault in ordered:
        if fault.rank >= num_ranks:
            raise ValueError(
                f"rank {fault.rank} cannot fail: ranks are 0 to {num_ranks - 1} in this cluster"
            )
        if fault.time_s < back.get(fault.rank, 0.0):
            raise ValueError(
                f"rank {fault.rank} fails at {fault.time_s:g} s, but is not back before "
                f"{back[fault.rank]:g} s"
            )
        back[fault.rank] = fault.back_s
    return tuple(ordered)
