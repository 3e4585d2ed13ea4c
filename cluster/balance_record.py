"""What the ranks report of their experts: the load that plans are made from, and what people watch.

Ranks count since their start. The difference between two looks is what happened in between; the
load of logical experts goes to the LoadWindow, the last few looks tell what each rank served.

R ranks, L layers with experts, E logical experts.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Counts = NDArray[np.int64]

ROWS_TAKEN = 128
"""Tokens sampled in one look, all ranks together; one of each if there are more ranks."""
LOOKS_KEPT = 11
"""Served counts cover the time between the first and the last of these."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Look:
    """All ranks' counters at one time (`time.monotonic()` seconds); all of them only grow."""

    at: float
    routed_LE: Counts
    """Tokens that chose each expert."""
    served_RL: Counts
    """(token, expert) pairs that each rank computed."""
    intra_node_bytes_R: Counts
    inter_node_bytes_R: Counts
    step_ms_R: tuple[float, ...]
    """Median of each rank's recent steps; 0: none yet."""
    moved_bytes: int
    """Of experts that came to a rank, all ranks together."""
    stall_ms: float
    """How long steps have waited for experts to move, on the rank where they waited longest."""

    @staticmethod
    def of(reports: Sequence[Mapping[str, Any]], at: float) -> Look:
        """From one `Worker.expert_stats` of each rank, in the order of ranks."""
        routed_LE = np.zeros_like(reports[0]["routed"], dtype=np.int64)
        for report in reports:
            routed_LE += report["routed"]
        sent = [report["bytes"] for report in reports]
        moved = [report["migration"] for report in reports]
        steps = [report["step_seconds"] for report in reports]
        return Look(
            at=at,
            routed_LE=routed_LE,
            served_RL=np.array([report["served"] for report in reports], dtype=np.int64),
            intra_node_bytes_R=np.array([s["intra_node"] for s in sent], dtype=np.int64),
            inter_node_bytes_R=np.array([s["inter_node"] for s in sent], dtype=np.int64),
            step_ms_R=tuple(1e3 * float(np.median(s)) if len(s) else 0.0 for s in steps),
            moved_bytes=sum(sum(m["bytes"].values()) for m in moved),
            stall_ms=1e3 * max(float(m["flip_s"]) for m in moved),
        )


class BalanceRecord:
    """The last looks. `add` takes the next one in."""

    def __init__(self) -> None:
        self._looks: deque[Look] = deque(maxlen=LOOKS_KEPT)

    @property
    def last(self) -> Look | None:
        return self._looks[-1] if self._looks else None

    def add(self, look: Look) -> Counts:
        """Returns the tokens [L, E] that chose each expert since the look before, or the start."""
        before = self.last.routed_LE if self.last else np.zeros_like(look.routed_LE)
        self._looks.append(look)
        return look.routed_LE - before

    def served(self) -> tuple[float, Counts]:
        """(Seconds, pairs [R, L] that each rank computed in them)."""
        first, last = self._looks[0], self._looks[-1]
        return last.at - first.at, last.served_RL - first.served_RL

    def sent_per_s(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Bytes [R] per second inside nodes and between them, in the last interval."""
        before, last = self._looks[max(-2, -len(self._looks))], self._looks[-1]
        seconds = max(last.at - before.at, 1e-9)
        return (
            (last.intra_node_bytes_R - before.intra_node_bytes_R) / seconds,
            (last.inter_node_bytes_R - before.inter_node_bytes_R) / seconds,
        )


def balancedness(served_RL: Counts) -> NDArray[np.float64]:
    """[L]: mean over ranks / maximum over ranks; 0 for layers that served nothing."""
    busiest_L = served_RL.max(axis=0)
    found_L: NDArray[np.float64] = served_RL.mean(axis=0) / np.maximum(busiest_L, 1)
    return found_L


def sampled_rows(reports: Sequence[Mapping[str, Any]]) -> NDArray[np.int64] | None:
    """[L, tokens, experts per token]: some tokens' experts from all ranks; None if none has any."""
    quota = max(1, ROWS_TAKEN // len(reports))
    rows = []
    for report in reports:
        # Layers are read while steps go on, so one may already show the next, shorter step.
        tokens = min(quota, *(len(rows_MK) for rows_MK in report["rows"]))
        if tokens:
            rows.append(np.stack([rows_MK[:tokens] for rows_MK in report["rows"]]))
    return np.concatenate(rows, axis=1) if rows else None
