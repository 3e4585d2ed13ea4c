"""Copies between two GPUs of one host: seconds by size, one way and both ways at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

EXPERT_BYTES = 3 * 7168 * 2048  # of DeepSeek-V3 in float8: what moving one takes
SIZES = tuple(sorted([EXPERT_BYTES, *(4096 << (2 * i) for i in range(9))]))  # 4 kB ... 256 MB


def link_times(sizes: Sequence[int] = SIZES) -> dict[str, Any]:
    """{"bytes": [...], "one_way_s": [...], "both_ways_s": [...]} between GPUs 0 and 1.

    Peer copies that follow each other without the host between them.
    """
    return {
        "bytes": list(sizes),
        "one_way_s": [_seconds(size, both=False) for size in sizes],
        "both_ways_s": [_seconds(size, both=True) for size in sizes],
    }


def _seconds(num_bytes: int, *, both: bool, copies: int = 20, repeats: int = 9) -> float:
    """Of one copy out of `copies` that follow each other; the slower direction of both."""
    pairs = [(0, 1), (1, 0)] if both else [(0, 1)]
    work = []
    for source, target in pairs:
        x = torch.randint(256, (num_bytes,), dtype=torch.uint8, device=f"cuda:{source}")
        work.append((source, x, torch.empty_like(x, device=f"cuda:{target}")))
    streams = {source: torch.cuda.Stream(source) for source, _, _ in work}
    times = []
    for _ in range(repeats + 1):
        marks = []
        for source, x, y in work:
            with torch.cuda.device(source), torch.cuda.stream(streams[source]):
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                for _ in range(copies):
                    y.copy_(x, non_blocking=True)
                end.record()
                marks.append((start, end))
        for source in streams:
            torch.cuda.synchronize(source)
        times.append(max(a.elapsed_time(b) for a, b in marks) / 1000 / copies)
    return float(f"{np.median(times[1:]):.4g}")
