"""How far a starting cluster is: what it waits for, for whom, and the one deadline of it all."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NamedTuple, TypeVar

_Answer = TypeVar("_Answer")
_ASK_S = 1.0


class Progress(NamedTuple):
    """For whoever waits: `stage` changes when another begins, `detail` all the time."""

    stage: str
    detail: str


class StartupError(RuntimeError):
    """Not all ranks were there in time; the message names those that were not, and their doings."""


class Startup:
    """Goes through stages, each of which every rank has to finish within what is left of `timeout_s`.

    ask: what a rank says of itself while it is waited for; it may fail, or take its time.
    """

    def __init__(self, timeout_s: float, ask: Callable[[int], Awaitable[str]]) -> None:
        self._timeout_s = timeout_s
        self._deadline = time.monotonic() + timeout_s
        self._ask = ask
        self._stage = "starting"
        self._began = time.monotonic()
        self._num_ranks = 0
        self._late: list[int] = []
        self._said: dict[int, str] = {}

    @property
    def progress(self) -> Progress:
        seconds = time.monotonic() - self._began
        if not self._late:
            return Progress(self._stage, f"{seconds:.0f} s")
        done = self._num_ranks - len(self._late)
        return Progress(
            self._stage,
            f"{done} of {self._num_ranks} done after {seconds:.0f} s, waiting for {self._whom()}",
        )

    def begin(self, stage: str) -> None:
        """A stage that is not of the ranks."""
        self._stage, self._began, self._late = stage, time.monotonic(), []

    async def all_ranks(self, stage: str, calls: Sequence[Awaitable[_Answer]]) -> list[_Answer]:
        """One call of each rank, in order; what the first that fails raises, or StartupError."""
        self.begin(stage)
        self._num_ranks, self._said = len(calls), {}
        tasks = [asyncio.ensure_future(call) for call in calls]
        left = set(tasks)
        try:
            while left:
                self._late = [rank for rank, task in enumerate(tasks) if task in left]
                left_s = self._deadline - time.monotonic()
                if left_s <= 0:
                    raise StartupError(
                        f"{len(left)} of {len(tasks)} ranks were not done with {stage} within "
                        f"ray.startup_timeout_s = {self._timeout_s:g} s: {self._whom()}"
                    )
                done, left = await asyncio.wait(
                    left, timeout=min(_ASK_S, left_s), return_when=asyncio.FIRST_EXCEPTION
                )
                for task in done:
                    task.result()
                await self._ask_late([rank for rank, task in enumerate(tasks) if task in left])
        finally:
            for task in left:
                task.cancel()
        self._late = []
        return [task.result() for task in tasks]

    def _whom(self) -> str:
        return ", ".join(
            f"rank {rank}" + (f" ({self._said[rank]})" if rank in self._said else "")
            for rank in self._late
        )

    async def _ask_late(self, ranks: Sequence[int]) -> None:
        """What ranks are at; who does not answer within a moment keeps what was heard before."""

        async def ask(rank: int) -> None:
            self._said[rank] = await self._ask(rank)

        if ranks:
            asked: list[Any] = [asyncio.ensure_future(ask(rank)) for rank in ranks]
            _, silent = await asyncio.wait(asked, timeout=_ASK_S)
            for task in silent:
                task.cancel()
            await asyncio.gather(*asked, return_exceptions=True)
