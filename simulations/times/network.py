"""Time on a link: a latency and a bandwidth, fitted per class of link.

    seconds = alpha + bytes / beta

An exchange is over when the busiest rank is done, and a rank sends and receives at the same time,
so its bytes are the larger of the two. R ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class Link:
    """One rank's share of a class of links, each way. alpha_s in seconds, beta in bytes/s."""

    alpha_s: float
    beta: float

    def __post_init__(self) -> None:
        if not (self.alpha_s >= 0 and self.beta > 0):
            raise ValueError(
                f"a link needs alpha_s >= 0 and beta > 0, got alpha_s={self.alpha_s}, "
                f"beta={self.beta}"
            )

    def seconds(self, num_bytes: ArrayLike, *, always: bool = False) -> Array:
        """Time for so many bytes; no bytes take no time, or alpha if the call is made `always`."""
        sizes = np.asarray(num_bytes)
        if sizes.dtype.kind != "f":
            sizes = sizes.astype(np.float64)
        return (sizes / self.beta) + (self.alpha_s if always else self.alpha_s * (sizes > 0))


def exchange_seconds(sent_R: Array, received_R: Array, link: Link) -> Array:
    """Of an exchange in which rank r sends sent[..., r] bytes and receives received[..., r]."""
    return link.seconds(np.maximum(sent_R, received_R).max(axis=-1))
