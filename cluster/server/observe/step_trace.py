"""What every rank does in the same few steps, recorded when somebody asks, as one file for Perfetto."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import suppress
from typing import Protocol

from cluster.ranks import RanksError, ask_all
from cluster.server.errors import Code, RequestError, invalid
from comms.trace import Trace
from comms.trace_file import trace_lines

DEFAULT_STEPS = 20
MAX_STEPS = 1000
DEFAULT_TIMEOUT_S = 30.0
MAX_TIMEOUT_S = 600.0
BEGIN_TIMEOUT_S = 10.0
MARGIN_S = 5.0
CHUNK_BYTES = 1 << 20


class TracedRank(Protocol):
    """One rank; see `cluster.engine.step_recorder.StepRecorder`."""

    async def begin_trace(self, timeout_s: float) -> int: ...
    async def take_trace(self, first: int, until: int, timeout_s: float) -> Trace: ...
    async def end_trace(self) -> None: ...


class StepTracer:
    """Asks all ranks to record; one recording at a time."""

    def __init__(self, ranks: Sequence[TracedRank]) -> None:
        self._ranks = ranks
        self._busy = False

    async def trace_file(
        self, num_steps: int | None = None, timeout_s: float | None = None
    ) -> AsyncIterator[bytes]:
        """The file, in chunks. Raises RequestError, and then there are no chunks.

        FAILED_PRECONDITION if the ranks do not make so many steps in time, as they do without requests.
        """
        num_steps = DEFAULT_STEPS if num_steps is None else num_steps
        timeout_s = DEFAULT_TIMEOUT_S if timeout_s is None else timeout_s
        if not 1 <= num_steps <= MAX_STEPS:
            raise invalid("num_steps", num_steps, f"in [1, {MAX_STEPS}]")
        if not 0 < timeout_s <= MAX_TIMEOUT_S:
            raise invalid("timeout_s", timeout_s, f"in (0, {MAX_TIMEOUT_S:g}]")
        if self._busy:
            raise RequestError(Code.FAILED_PRECONDITION, "another trace is being recorded")
        self._busy = True
        try:
            traces = await self._record(num_steps, timeout_s)
        except RanksError as error:
            raise RequestError(Code.FAILED_PRECONDITION, str(error)) from None
        finally:
            self._busy = False
        lines = trace_lines(traces)
        # In a thread: making the text of a long trace takes seconds.
        while chunk := await asyncio.to_thread(_next_chunk, lines):
            yield chunk

    async def _record(self, num_steps: int, timeout_s: float) -> list[Trace]:
        try:
            firsts = await ask_all(
                self._ranks,
                lambda rank: rank.begin_trace(BEGIN_TIMEOUT_S),
                "begun to record its steps",
                BEGIN_TIMEOUT_S + MARGIN_S,
            )
            first = max(firsts)
            return await ask_all(
                self._ranks,
                lambda rank: rank.take_trace(first, first + num_steps, timeout_s),
                "recorded its steps",
                timeout_s + MARGIN_S,
            )
        except BaseException:
            await self._end()
            raise

    async def _end(self) -> None:
        """Whatever has happened: ranks that record for nobody would go on and on."""
        with suppress(RanksError):
            await asyncio.shield(
                ask_all(self._ranks, lambda rank: rank.end_trace(), "ended its recording", MARGIN_S)
            )


def _next_chunk(lines: Iterator[str]) -> bytes:
    """The next lines, a little over CHUNK_BYTES of them; nothing at the end."""
    chunk = bytearray()
    for line in lines:
        chunk += line.encode()
        if len(chunk) >= CHUNK_BYTES:
            break
    return bytes(chunk)
