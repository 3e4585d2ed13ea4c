"""What kernels say of peers that did not come, read by the host without waiting for the device.

Kernels write into memory of the host (`comms/kernels/signals.py` says what), the first failure only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from comms.group import CommError, CommTimeout
from comms.kernels.signals import DISAGREES, REPORT_WORDS, ROWS_BITS
from comms.where import Where

_KINDS = ("dispatch", "combine")


class Report:
    """One rank's. `lines`: int64 [kind, peer, word]. `failed`: int64 [1] on the device, not 0 once a
    kernel has given up: from then on none waits."""

    def __init__(
        self, rank: int, world_size: int, device: torch.device, where: Where, timeout_s: float
    ) -> None:
        self.rank, self.where, self.timeout_s = rank, where, timeout_s
        shape = (len(_KINDS), world_size, REPORT_WORDS)
        self.lines: Tensor = torch.zeros(shape, dtype=torch.int64, pin_memory=device.type == "cuda")
        self.failed = torch.zeros(1, dtype=torch.int64, device=device)
        self._seen = self.lines.numpy()

    @property
    def deadline_ns(self) -> int:
        return round(self.timeout_s * 1e9)

    def check(self, num_rows: int) -> None:
        """Raise CommTimeout for peers that were late, CommError for one that expected another number
        of rows than ours."""
        if not self._seen.any():
            return
        kind = 0 if self._seen[0].any() else 1
        peers = self._seen[kind, :, 0].nonzero()[0].tolist()
        what, wanted, flag = self._seen[kind, peers[0], :3].tolist()
        if what == DISAGREES:
            where = f"{self.where}, " if str(self.where) else ""
            raise CommError(
                f"{where}rank {self.rank} expected {num_rows} rows of rank {peers[0]} in "
                f"{_KINDS[kind]}, which sent {flag & ((1 << ROWS_BITS) - 1)}"
            )
        raise CommTimeout(
            group="symmetric memory",
            operation=f"{_KINDS[kind]} (signal {wanted}; the last was {flag >> ROWS_BITS})",
            rank=self.rank,
            silent=peers,
            deadline_s=self.timeout_s,
            where=str(self.where),
        )
