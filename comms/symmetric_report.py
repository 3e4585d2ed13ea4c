"""What kernels say of peers that did not come, read by the host without waiting for the device.

Kernels write into memory of the host (`comms/kernels/signals.py` says what), the first failure only.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from comms.group import CommError, CommTimeout
from comms.kernels.signals import DISAGREES, REPORT_WORDS, ROWS_BITS
from comms.where import Where


class Report:
    """Of rank `ranks[idx]`, whose peers are `ranks`. `lines`: int64 [kind, peer, word]. `failed`: int64 [1] on the device, not 0 once a
    kernel has given up: from then on none waits."""

    def __init__(
        self,
        idx: int,
        ranks: Sequence[int],
        device: torch.device,
        where: Where,
        timeout_s: float,
        kinds: Sequence[str] = ("dispatch", "combine"),
    ) -> None:
        """kinds: of transfers, as errors name them."""
        self.rank, self.where, self.timeout_s = ranks[idx], where, timeout_s
        self._ranks, self._kinds = ranks, kinds
        shape = (len(kinds), len(ranks), REPORT_WORDS)
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
        kind = next(k for k, line in enumerate(self._seen) if line.any())
        late = self._seen[kind, :, 0].nonzero()[0].tolist()
        peers = [self._ranks[i] for i in late]
        what, wanted, flag = self._seen[kind, late[0], :3].tolist()
        if what == DISAGREES:
            where = f"{self.where}, " if str(self.where) else ""
            raise CommError(
                f"{where}rank {self.rank} expected {num_rows} rows of rank {peers[0]} in "
                f"{self._kinds[kind]}, which sent {flag & ((1 << ROWS_BITS) - 1)}"
            )
        raise CommTimeout(
            group="symmetric memory",
            operation=f"{self._kinds[kind]} (signal {wanted}; the last was {flag >> ROWS_BITS})",
            rank=self.rank,
            silent=peers,
            deadline_s=self.timeout_s,
            where=str(self.where),
        )
