"""Counters by which the last program of a tile knows that it is the last, and places where programs tell
each other something (hopper_words.py). Zero before and after a kernel.

Work of one stream is in order and may share them; two streams may not, so each has its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

MOST_COUNTERS = 48 * 1024
_MOST_STREAMS = 64

_pools: dict[torch.device, Tensor] = {}
_places: dict[tuple[torch.device, int], int] = {}


def counters(device: torch.device, number: int) -> Tensor:
    """int32 zeros of the current stream; a kernel leaves zeros behind. More than a stream has are made anew.

    The first call for a device must not be inside the capture of a graph. Two graphs captured on one
    stream share counters and may not run at the same time.
    """
    if number > MOST_COUNTERS or device.type != "cuda":  # the latter is Triton's interpreter
        return torch.zeros(number, dtype=torch.int32, device=device)
    pool = _pools.get(device)
    if pool is None:
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError("call the kernels once before they are captured in a graph")
        pool = torch.zeros(_MOST_STREAMS, MOST_COUNTERS, dtype=torch.int32, device=device)
        torch.cuda.synchronize(device)  # zeros before any other stream counts
        _pools[device] = pool
    stream = torch.cuda.current_stream(device).cuda_stream
    place = _places.setdefault((device, stream), sum(d == device for d, _ in _places))
    if place >= _MOST_STREAMS:
        raise RuntimeError(f"kernels run on more than {_MOST_STREAMS} streams")
    return pool[place]
