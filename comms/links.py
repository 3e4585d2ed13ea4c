"""How fast the links between nodes are, measured once so that nobody has to configure it.

An exchange over a rail takes about `latency_s` plus its bytes over `bytes_per_s`. Links let a burst
through faster than they go on (a token bucket, a switch's buffer): sizes double until one takes long
enough, and by then the smaller ones have used up the burst. All rails are busy at once, as they are
in a step: the ranks of a node share its link.
"""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from comms.group import Group

_SMALL_EXCHANGES = 7
_FIRST_BYTES = 128 * 1024
_MOST_BYTES = 4 << 20
_LONG_ENOUGH_S = 8e-3


@dataclass(frozen=True, kw_only=True)
class LinkSpeed:
    """Of the slowest rail: an empty exchange, and bytes that a rank sends (and gets) a second."""

    latency_s: float
    bytes_per_s: float

    def seconds(self, num_bytes: int) -> float:
        """What an exchange should take in which a rank sends that many bytes in all."""
        return self.latency_s + num_bytes / self.bytes_per_s


def measure_links(rail: Group, world: Group) -> LinkSpeed | None:
    """All ranks of the world call this and get the same answer; None where there is one node."""
    if rail.size == 1:
        return None
    nothing = [torch.empty(0, dtype=torch.uint8)] * rail.size
    _swap_seconds(rail, nothing)  # warm
    latency_s = statistics.median(_swap_seconds(rail, nothing) for _ in range(_SMALL_EXCHANGES))
    num_bytes, seconds = _FIRST_BYTES, 0.0
    while seconds < _LONG_ENOUGH_S and num_bytes < _MOST_BYTES:
        num_bytes *= 2
        parts = [torch.zeros(num_bytes // (rail.size - 1), dtype=torch.uint8)] * rail.size
        seconds = _swap_seconds(rail, parts)
    long_s = max(seconds - latency_s, seconds / 10)  # noise may make the small ones slow
    mine = torch.tensor([[latency_s, long_s / num_bytes]], dtype=torch.float64)
    latency_s, s_per_byte = world.all_gather(mine, [1] * world.size).amax(dim=0).tolist()
    return LinkSpeed(latency_s=latency_s, bytes_per_s=1 / s_per_byte)


def _swap_seconds(rail: Group, parts: Sequence[Tensor]) -> float:
    """Seconds of an exchange on the slowest member: the same number on all of them."""
    rail.barrier()
    start = time.perf_counter()
    rail.exchange(parts, "measure_links")
    mine = torch.tensor([time.perf_counter() - start], dtype=torch.float64)
    return float(rail.all_gather(mine, [1] * rail.size).max())
