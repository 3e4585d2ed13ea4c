"""The kernels of a rank's exchange over symmetric memory, and what they keep from one launch to the next.

Legend: T my tokens, H hidden, K top-k, V records, R received rows, P pairs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from comms.fixed import greatest_summand
from comms.kernels.combine import combine_rows
from comms.kernels.dispatch import dispatch_rows, wait_for_rows
from comms.kernels.forward import forward_rows
from comms.kernels.signals import SENT, STATE_WORDS
from comms.rail_record import RailRecord
from comms.symmetric_layout import BUFFERS, PROGRAMS, SymmetricLayout
from comms.symmetric_memory import SymmetricMemory
from comms.symmetric_report import Report
from comms.symmetric_tiles import Tiles
from comms.symmetric_types import SymmetricHandle

_DISPATCH, _COMBINE = 0, 1  # of state and report


class ExchangeKernels:
    """Arguments are as they must be (`comms/symmetric.py` checks them). Nothing waits for the device but
    `bytes_sent`."""

    def __init__(
        self,
        layout: SymmetricLayout,
        memory: SymmetricMemory,
        report: Report,
        programs: int | None,
    ) -> None:
        self.layout, self.device = layout, memory.device
        self._report, self._rank = report, memory.rank
        is_gpu = self.device.type == "cuda"
        # On a CPU kernels are interpreted: ranks of one process, one after the other.
        self.signals = is_gpu and layout.world_size > 1
        multiprocessors = (
            torch.cuda.get_device_properties(self.device).multi_processor_count if is_gpu else 1
        )
        self._tiles = Tiles(layout, multiprocessors, programs)
        self._tables = [
            torch.tensor(
                [
                    [address + offset for address in memory.addresses]
                    for offset in layout.offsets(i)
                ],
                dtype=torch.int64,
                device=self.device,
            )
            for i in range(BUFFERS)
        ]
        """int64 [region, rank]: addresses, on the device."""
        # What each program of a dispatch and of a combine keeps, by buffer: see `comms/kernels/signals.py`.
        state = (2, BUFFERS, STATE_WORDS, PROGRAMS)
        self._state = torch.zeros(state, dtype=torch.int64, device=self.device)
        self._limit = greatest_summand(layout.num_topk)
        self._sizes = {
            "WORLD": layout.world_size,
            "H": layout.hidden,
            "K": layout.num_topk,
            "PADDED_K": 1 << (layout.num_topk - 1).bit_length(),
            "SLOTS_PER_RANK": layout.slots_per_rank,
        }
        self._of_rows = {
            **self._sizes,
            "ROW_BYTES": layout.row_bytes,
            "FLOAT8": layout.dispatch_dtype == "float8",
            "RANGED": layout.combine == "fixed",
            "SIGNALS": self.signals,
        }

    def dispatch(
        self, x_TH: Tensor, weights_TK: Tensor, handle: SymmetricHandle, *, waits: bool
    ) -> None:
        """waits: the same kernel waits for the others' rows."""
        tile = self._tiles.dispatch(handle.num_rows)
        range_T = weights_TK if handle.range_T is None else handle.range_T
        dispatch_rows[(tile.programs,)](
            x_TH, handle.slots_TK, weights_TK, range_T, *self._transfer(_DISPATCH, handle.buffer),
            len(x_TH), handle.num_rows, self._rank, self._report.deadline_ns,
            PADDED_H=tile.channels, WAITS=waits, **self._of_rows, **tile.options,
        )  # fmt: skip

    def forward(
        self,
        records: Tensor,
        rows_of_source: int,
        node: int,
        told: tuple[Tensor, Tensor],
        arrived_M: Tensor | None,
        handle: SymmetricHandle,
        *,
        waits: bool,
    ) -> None:
        """Writes the handle's slots."""
        tile, record = self._tiles.dispatch(handle.num_rows), RailRecord(self.layout)
        forward_rows[(tile.programs,)](
            handle.slots_TK, records, handle.slots_TK if arrived_M is None else arrived_M,
            *self._transfer(_DISPATCH, handle.buffer), *told, handle.num_rows, rows_of_source, node,
            self._rank, self._report.deadline_ns,
            PADDED_WORDS=tile.channels * self.layout.row_dtype.itemsize // 4, RECORD=record.words,
            SCALES_AT=record.scales_at, SLOTS_AT=record.slots_at, COUNTED=arrived_M is not None,
            WAITS=waits, **self._of_rows, **tile.options,
        )  # fmt: skip

    def wait(self, handle: SymmetricHandle) -> None:
        """For the others' rows."""
        wait_for_rows[(self._tiles.dispatch(handle.num_rows).programs,)](
            *self._transfer(_DISPATCH, handle.buffer), handle.num_rows, self._rank,
            self._report.deadline_ns, WORLD=self.layout.world_size, num_warps=1,
        )  # fmt: skip

    def combine(
        self,
        y_PH: Tensor,
        place_RK: Tensor | None,
        handle: SymmetricHandle,
        extra_TH: Tensor | None,
        *,
        sends: bool,
        adds: bool,
    ) -> Tensor:
        """out_TH, which only a kernel that adds has filled; [T, sum_columns] in a node of several."""
        layout, received, sums = self.layout, handle.received, RailRecord(self.layout)
        columns, dtype = layout.hidden, torch.bfloat16
        if layout.of_several:
            columns, dtype = sums.sum_columns, sums.sum_dtype
        num_tokens, sends = len(handle.slots_TK), sends and layout.world_size > 1
        shape = (num_tokens if adds else 0, columns)
        out_TH = torch.empty(shape, dtype=dtype, device=self.device)
        tile = self._tiles.combine(handle.num_rows)
        is_split = sends and adds and tile.chunk < tile.rounds
        combine_rows[(tile.programs * (1 + is_split),)](
            out_TH, out_TH if extra_TH is None else extra_TH, handle.slots_TK,
            received.weights_RK if handle.range_T is None else handle.range_T,
            y_PH, received.local_slots_RK if place_RK is None else place_RK,
            received.local_slots_RK, received.weights_RK,
            received.weights_RK if received.range_R is None else received.range_R,
            *self._transfer(_COMBINE, handle.buffer), num_tokens, handle.num_rows, self._rank,
            tile.chunk, self._limit, self._report.deadline_ns,
            SUMMED=place_RK is None, FIXED=layout.combine == "fixed", EXTRA=extra_TH is not None,
            SENDS=sends, ADDS=adds, SPLIT=is_split, SIGNALS=self.signals, PART=layout.of_several,
            COLUMNS=columns, BLOCK_H=tile.channels, **self._sizes, **tile.options,
        )  # fmt: skip
        return out_TH

    @property
    def bytes_sent(self) -> int:
        return int(self._state.cpu()[:, :, SENT].sum())

    def forget_bytes(self) -> None:
        self._state[:, :, SENT].zero_()

    def _transfer(self, kind: int, buffer: int) -> tuple[Any, ...]:
        """What every kernel takes: addresses, its own numbers, and where it tells who did not come."""
        report = self._report
        return self._tables[buffer], self._state[kind, buffer], report.failed, report.lines[kind]
