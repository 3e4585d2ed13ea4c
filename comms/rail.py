"""How rows get from a rank to the ranks with its local rank on the other nodes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor


class Rail(Protocol):
    """Ranks with one local rank, by node. What is started on a stream can be captured in a graph."""

    @property
    def idx(self) -> int:
        """Of my node."""

    @property
    def size(self) -> int:
        """How many nodes there are."""

    def start(self, outs: Sequence[Tensor], parts: Sequence[Tensor]) -> None:
        """outs[i] is to become what node i has in its parts[idx], of the same number of bytes; what is at
        [idx] stays. On the current stream, which must not change `parts` before `finish`."""

    def finish(self) -> None:
        """Kernels launched from here on find all of it there."""

    def abort(self) -> None:
        """Whatever is under way ends, and nothing works any more. From any thread."""
