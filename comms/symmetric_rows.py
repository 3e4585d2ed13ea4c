"""Rows of a replica whose attention is divided over GPUs of a node, through memory that these share.

What `TokenRows` of `cluster/model/shards.py` does on CPUs, with the norms around it and with static shapes:

    rows_TH, sum_OH = rows.gather(x_OH, added_OH, norm)         # norm, then every rank's rows
    parts_TH = ...                                              # of my heads or channels
    normed_OH, sum_OH = rows.scatter(parts_TH, residual_OH, norm)   # my rows of the ranks' sums, then norm

Each is one kernel (`comms/kernels/tensor_parallel.py`), without synchronisation of the host. They take
turns, on all ranks alike. T is what `expect` was told last, the same on all ranks; own rows beyond T are
padding. Deadlines and errors are those of `comms/symmetric.py`.

Legend: T rows of the replica, W ranks, O = ceil(T / W) own rows, H hidden, V vocabulary, L logit rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from comms.kernels.signals import STATE_WORDS
from comms.kernels.tensor_parallel import gather_columns, gather_rows, scatter_sums
from comms.store import Store
from comms.symmetric_layout import PROGRAMS
from comms.symmetric_memory import SymmetricMemory
from comms.symmetric_report import Report
from comms.symmetric_rows_layout import KINDS, LOGIT_ROWS, Norm, RowsLayout
from comms.symmetric_types import check_tensor
from comms.where import Where

_BLOCK = 2048  # logits of a program at a time


class SymmetricRows:
    """Raises ValueError for tensors that cannot be, CommTimeout and CommError as in `check`.

    ranks: of the world, in the replica's order, as errors name them. early: kernels are launched before the
    one ahead has ended (from Hopper on).
    """

    def __init__(
        self,
        layout: RowsLayout,
        memory: SymmetricMemory,
        *,
        ranks: Sequence[int] | None = None,
        where: Where | None = None,
        timeout_s: float = 60.0,
        early: bool = False,
    ) -> None:
        memory.check_fits(layout.world_size, layout.num_bytes)
        self.layout, self.memory, self.rank = layout, memory, memory.rank
        self.num_rows = layout.capacity
        device = memory.device
        # On a CPU kernels are interpreted: ranks of one process, one after the other.
        self._signals = device.type == "cuda" and layout.world_size > 1
        self.most_programs = 16
        if device.type == "cuda":
            self.most_programs = 2 * torch.cuda.get_device_properties(device).multi_processor_count
        self._starts = [sum(layout.region_bytes[:i]) for i in range(len(layout.region_bytes))]
        self._tables = [self._table(kind) for kind in range(len(KINDS))]
        state = (len(KINDS), STATE_WORDS, PROGRAMS)
        self._state = torch.zeros(state, dtype=torch.int64, device=device)
        self.report = Report(
            self.rank,
            ranks or range(layout.world_size),
            device,
            where or Where(),
            timeout_s,
            KINDS,
        )
        self._early: dict[str, Any] = {"EARLY": early, **({"launch_pdl": True} if early else {})}
        block = 1 << (layout.hidden - 1).bit_length()
        self._options: dict[str, Any] = {
            "WORLD": layout.world_size,
            "H": layout.hidden,
            "BLOCK": block,
            "num_warps": min(16, max(1, block // 256)),
            **self._early,
        }

    @classmethod
    def connect(
        cls,
        layout: RowsLayout,
        store: Store,
        rank: int,
        device: torch.device,
        *,
        ranks: Sequence[int] | None = None,
        where: Where | None = None,
        timeout_s: float = 60.0,
        early: bool = False,
    ) -> SymmetricRows:
        """Collective over the ranks of a replica, `rank` among them; each is a process with a GPU."""
        memory = SymmetricMemory.connect(store, rank, layout.world_size, layout.num_bytes, device)
        return cls(layout, memory, ranks=ranks, where=where, timeout_s=timeout_s, early=early)

    def expect(self, num_rows: int) -> None:
        """T of what comes, the same on all ranks. A graph captured now has it for good."""
        if not 1 <= num_rows <= self.layout.capacity:
            raise ValueError(f"room for {self.layout.capacity} rows, expected {num_rows}")
        self.num_rows = num_rows

    @property
    def num_own(self) -> int:
        """O: my rows, padding among them, are those from rank * O on."""
        return -(-self.num_rows // self.layout.world_size)

    def check(self) -> None:
        """Raise CommTimeout if a kernel gave up on a peer, CommError if ranks expected different
        numbers of rows. Needs no synchronisation, sees what is done."""
        self.report.check(self.num_own)

    def gather(
        self, x_OH: Tensor, added_OH: Tensor | None = None, norm: Norm | None = None
    ) -> tuple[Tensor, Tensor]:
        """(norm of x + added of all ranks' rows [T, H], x + added [O, H]), bfloat16. The first lies in
        shared memory and lasts until the next gather."""
        own = (self.num_own, self.layout.hidden)
        check_tensor("x_OH", x_OH, (torch.bfloat16,), own)
        sum_OH = x_OH
        if added_OH is not None:
            check_tensor("added_OH", added_OH, (torch.bfloat16,), own)
            sum_OH = torch.empty_like(x_OH)
        gather_rows[(min(self.num_own, self.most_programs),)](
            x_OH, x_OH if added_OH is None else added_OH, x_OH if norm is None else norm.weight,
            sum_OH, *self._transfer(0), self.num_own, self.rank, self.report.deadline_ns,
            0.0 if norm is None else norm.eps,
            ADDS=added_OH is not None, NORMS=norm is not None, SIGNALS=self._signals, **self._options,
        )  # fmt: skip
        size = self.num_rows * self.layout.hidden * 2
        rows_TH = self.memory.bytes[:size].view(torch.bfloat16)
        return rows_TH.view(self.num_rows, self.layout.hidden), sum_OH

    def scatter(
        self,
        parts_TH: Tensor,
        residual_OH: Tensor | None = None,
        norm: Norm | None = None,
        *,
        half: Literal["sends", "receives"] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(norm of the sum, the sum) of my rows [O, H] bfloat16: over the ranks in fp32, rounded, plus the
        residual. Without a norm both are the sum. half: where kernels are interpreted, all ranks send
        before the first receives."""
        check_tensor("parts_TH", parts_TH, (torch.bfloat16,), (self.num_rows, self.layout.hidden))
        own = (self.num_own, self.layout.hidden)
        if residual_OH is not None:
            check_tensor("residual_OH", residual_OH, (torch.bfloat16,), own)
        sum_OH = parts_TH.new_empty(own)
        out_OH = sum_OH if norm is None else torch.empty_like(sum_OH)
        scatter_sums[(min(self.num_own, self.most_programs),)](
            parts_TH, sum_OH if residual_OH is None else residual_OH,
            sum_OH if norm is None else norm.weight, out_OH, sum_OH, *self._transfer(1),
            self.num_rows, self.num_own, self.rank, self.report.deadline_ns,
            0.0 if norm is None else norm.eps,
            ADDS=residual_OH is not None, NORMS=norm is not None, SENDS=half != "receives",
            RECEIVES=half != "sends", SIGNALS=self._signals, enable_fp_fusion=False, **self._options,
        )  # fmt: skip
        return out_OH, sum_OH

    def gather_logits(self, logits_LW: Tensor, first: int, out_LV: Tensor) -> None:
        """Everybody's columns, mine from `first` on, to out_LV fp32: LOGIT_ROWS of them at a time."""
        for chunk, begin in enumerate(range(0, len(logits_LW), LOGIT_ROWS)):
            part = logits_LW[begin : begin + LOGIT_ROWS]
            out_LV[begin : begin + LOGIT_ROWS].copy_(self.start_logits(part, first, chunk))

    def start_logits(self, logits_LW: Tensor, first: int, chunk: int) -> Tensor:
        """[L, V] bfloat16 in shared memory, whole when all ranks' kernels are done: in one of two places, by
        turns, so that a peer's next but one finds this one read."""
        num_rows, width = logits_LW.shape
        check_tensor("logits_LW", logits_LW, (torch.bfloat16,), (num_rows, width))
        vocab = self.layout.vocab_size
        blocks = -(-vocab // self.layout.world_size // _BLOCK)  # of the widest part
        offset = chunk % 2 * LOGIT_ROWS * vocab
        gather_columns[(min(num_rows * blocks, self.most_programs),)](
            logits_LW, *self._transfer(2), num_rows, width, first, offset, self.rank,
            self.report.deadline_ns, WORLD=self.layout.world_size, V=vocab, BLOCKS=blocks, BLOCK=_BLOCK,
            SIGNALS=self._signals, num_warps=8, **self._early,
        )  # fmt: skip
        start = self._starts[2] + 2 * offset
        return (
            self.memory.bytes[start : start + 2 * num_rows * vocab]
            .view(torch.bfloat16)
            .view(num_rows, vocab)
        )

    def _transfer(self, kind: int) -> tuple[Tensor, ...]:
        lines = self.report.lines[kind]
        return self._tables[kind], self._state[kind], self.report.failed, lines

    def _table(self, kind: int) -> Tensor:
        """int64 [region, rank]: addresses of rows, parts, logits and this kind's flags, on the device."""
        starts = [*self._starts[:3], self._starts[3 + kind]]
        rows = [[address + start for address in self.memory.addresses] for start in starts]
        return torch.tensor(rows, dtype=torch.int64, device=self.memory.device)
