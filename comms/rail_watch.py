"""The deadline of exchanges between nodes: kernels of NCCL wait for a peer for good, in graphs too.

Each dispatch and combine goes through three kernels of ours, which count (`comms/kernels/progress.py`): one
before the rows cross, one when they are here, one when the sums came back. The number stands in memory
of the host, so that a thread sees, without a word to the device, how far the GPU is: at a multiple of
three it is between two exchanges and may take its time. If it stays elsewhere for too long, the thread
ends what NCCL is doing, and `check` tells who waited for whom. (What the host does between the three, such
as compiling kernels the first time, counts too: a deadline of seconds is too short for a first pass.)
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

import torch
from torch import Tensor

from comms.group import CommTimeout
from comms.store import PrefixStore, Store
from comms.where import Where

_KERNELS = 3
_STAGES = ("", "dispatch", "combine")


class Progress:
    """count: int64 [2] on the device, kernels and bytes sent to other nodes. told: int64 [1], the kernels
    again, on the host, written by the device."""

    def __init__(self, device: torch.device) -> None:
        self.count = torch.zeros(2, dtype=torch.int64, device=device)
        self.told = torch.zeros(1, dtype=torch.int64, pin_memory=device.type == "cuda")
        self._seen = self.told.numpy()

    @property
    def tensors(self) -> tuple[Tensor, Tensor]:
        return self.told, self.count

    @property
    def kernels(self) -> int:
        return int(self._seen[0])


class RailWatch:
    """A thread that calls `abort` when my exchange with `ranks` has made no progress for timeout_s."""

    def __init__(
        self,
        progress: Progress,
        store: Store,
        idx: int,
        ranks: Sequence[int],
        where: Where,
        *,
        name: str,
        timeout_s: float,
        abort: Callable[[], None],
    ) -> None:
        self._progress, self._idx, self._ranks, self._where = progress, idx, tuple(ranks), where
        self._store = PrefixStore(f"{name}/late", store).clone()  # type: ignore[attr-defined]  # of its own connection
        self._name, self._timeout_s, self._abort = name, timeout_s, abort
        self._error: CommTimeout | None = None
        self._is_closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name=f"expertmesh-{name}", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise CommTimeout if an exchange has failed."""
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        self._is_closed.set()
        self._thread.join()

    def _watch(self) -> None:
        last, since, is_noted = -1, time.monotonic(), False
        while not self._is_closed.wait(min(0.2, self._timeout_s / 16)):
            kernels, now = self._progress.kernels, time.monotonic()
            if kernels != last or kernels % _KERNELS == 0:
                last, since, is_noted = kernels, now, False
            elif now - since > self._timeout_s:
                self._fail(kernels)
                return
            elif now - since > self._timeout_s / 2 and not is_noted:
                self._note(kernels)
                is_noted = True

    def _fail(self, kernels: int) -> None:
        """The error is there before kernels end and the host looks."""
        exchange, stage = divmod(kernels, _KERNELS)
        self._error = CommTimeout(
            group=self._name,
            operation=f"{_STAGES[stage]} (exchange {exchange + 1})",
            rank=self._ranks[self._idx],
            silent=self._silent(kernels),
            deadline_s=self._timeout_s,
            where=str(self._where),
        )
        self._abort()

    def _note(self, kernels: int) -> None:
        """I wait here too; early, so that others who came first do not take me for the late one."""
        with suppress(RuntimeError):  # the store is gone
            self._store.set(f"{kernels}/{self._idx}", "1")

    def _silent(self, kernels: int) -> list[int]:
        """World ranks that have not noted that they wait in this exchange."""
        try:
            return [
                rank
                for i, rank in enumerate(self._ranks)
                if i != self._idx and not self._store.check([f"{kernels}/{i}"])
            ]
        except RuntimeError:
            return []
