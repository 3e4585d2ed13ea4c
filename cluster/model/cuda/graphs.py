"""Steps of few tokens as captured graphs: one launch for a whole pass over the layers.

A graph has the shapes that it was captured with, so there is one for each of a few numbers of rows, and
for each of a few widths of the block tables; a step takes the smallest that it fits and the rest is
padding. Which tokens belong to which sequence are numbers on the device: decoding, short prompts and
both together replay the same graph. It is captured on a pass without tokens, which writes nothing.

Where experts are on several GPUs that pass is made with the others, and once more than where the graph is
there already. So all ranks take the same rows and width in a step: they have the same graphs at any time.

Legend: T rows, B blocks of a table.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch

from cluster.model.batch import ForwardBatch
from cluster.model.cuda.inputs import StepInputs, spare_slot
from cluster.model.kv_cache import KVCache

ROWS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
WIDTHS = tuple(32 * 4**i for i in range(9))
"""Blocks of a table: the attention kernel's grid grows with it."""

Out = TypeVar("Out")
Compute = Callable[[StepInputs, KVCache, int, int], Out]
"""Of inputs and cache, for that many rows of every rank, in that form (see `exchange`)."""


def padded(num_tokens: int) -> int:
    """Rows of a pass, by the most tokens that any rank has in it."""
    return ROWS[bisect_left(ROWS, num_tokens)] if num_tokens <= ROWS[-1] else num_tokens


@dataclass(frozen=True, kw_only=True)
class Captured(Generic[Out]):
    """`inputs` are what the graph reads; `staged`, in pinned memory, is what is copied there. `out`: what
    the pass gave, overwritten by every replay."""

    graph: torch.cuda.CUDAGraph
    inputs: StepInputs
    staged: StepInputs
    copied: torch.cuda.Event
    out: Out


class StepGraphs:
    """Of one model on one device, and of one cache: those of another are forgotten when it comes."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._captured: dict[tuple[int, int, int], Captured[Any]] = {}
        self._kv: KVCache | None = None
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)

    def __len__(self) -> int:
        return len(self._captured)

    def clear(self) -> None:
        """Forget all graphs."""
        self._captured.clear()

    @staticmethod
    def fit(batch: ForwardBatch, num_rows: int) -> bool:
        """Whether the step is small enough, with no more sequences than rows."""
        num_tables, width = batch.block_tables_NB.shape
        return num_tables <= num_rows <= ROWS[-1] and width <= WIDTHS[-1]

    def run(
        self, batch: ForwardBatch, num_rows: int, form: int, kv: KVCache, compute: Compute[Out]
    ) -> Out:
        """What `compute` gives, in the graph's own memory: valid until any graph runs again."""
        captured = self.captured(num_rows, batch.block_tables_NB.shape[1], kv, compute, form)
        captured.copied.synchronize()  # the last step's numbers may still be on their way
        captured.staged.fill(batch, spare_slot(kv))
        captured.inputs.buffer.copy_(captured.staged.buffer, non_blocking=True)
        captured.copied.record()
        captured.graph.replay()
        return captured.out

    def captured(
        self, num_rows: int, width: int, kv: KVCache, compute: Compute[Out], form: int = 0
    ) -> Captured[Out]:
        """The graph for that many tokens and blocks, captured now if there is none yet."""
        if kv is not self._kv:  # a graph has its addresses for good
            self._captured.clear()
            self._kv = kv
        key = padded(num_rows), WIDTHS[bisect_left(WIDTHS, width)], form
        if key not in self._captured:
            self._captured[key] = self._capture(*key, kv, compute)
        return self._captured[key]

    def _capture(
        self, rows: int, width: int, form: int, kv: KVCache, compute: Compute[Out]
    ) -> Captured[Out]:
        inputs = StepInputs.empty(rows, rows, width, rows, self._device)
        staged = StepInputs.empty(rows, rows, width, rows, torch.device("cpu"), pinned=True)
        staged.fill(ForwardBatch.empty(), spare_slot(kv))
        inputs.buffer.copy_(staged.buffer)
        outs: list[Out] = []
        graph = self.capture(lambda: outs.append(compute(inputs, kv, rows, form)))
        return Captured(
            graph=graph, inputs=inputs, staged=staged, copied=torch.cuda.Event(), out=outs[-1]
        )

    def capture(self, work: Callable[[], object]) -> torch.cuda.CUDAGraph:
        """A graph of what `work` launches. It is called twice, and must do no harm the first time."""
        here = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(here)
        with torch.cuda.stream(self._stream):
            work()  # kernels compile, libraries set themselves up
        self._stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        # Other threads of the process may use the device meanwhile: a leader samples.
        with torch.cuda.graph(
            graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
        ):
            work()
        here.wait_stream(self._stream)
        return graph
