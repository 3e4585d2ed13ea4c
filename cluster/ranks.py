"""The ranks as the controller speaks to them: all at once, and never waiting without a deadline."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

_Rank = TypeVar("_Rank")
_Answer = TypeVar("_Answer")


class RanksError(RuntimeError):
    """Some ranks did not do what they were asked for; the message says which, what and why."""


class Rank(Protocol):
    """One rank; nothing that it is asked for here waits for a step or makes one wait."""

    async def expert_stats(self) -> Mapping[str, Any]:
        """Counters since the start, see `cluster.worker.Worker.expert_stats`."""

    async def prepare(self, epoch: int, layer: int, row: Sequence[int]) -> None:
        """Get the weights that its slots of `row` need; returns when all of them are there."""

    async def abandon(self, epoch: int) -> None:
        """Forget what was prepared, or is being prepared, for `epoch`."""


async def ask_all(
    ranks: Sequence[_Rank],
    call: Callable[[_Rank], Awaitable[_Answer]],
    done: str,
    timeout_s: float,
) -> list[_Answer]:
    """Every rank's answer; raises RanksError as soon as one fails or when time is up.

    `done` says what was asked for: "rank 3 has not {done} within 10 s".
    """
    tasks = [asyncio.ensure_future(call(rank)) for rank in ranks]
    try:
        ended, late = await asyncio.wait(
            tasks, timeout=timeout_s, return_when=asyncio.FIRST_EXCEPTION
        )
    finally:
        for task in tasks:
            task.cancel()
    errors = {tasks.index(task): task.exception() for task in ended}
    for rank, error in sorted(errors.items()):
        if error is not None:
            raise RanksError(
                f"rank {rank} has not {done}: {type(error).__name__}: {error}"
            ) from error
    if late:
        names = ", ".join(str(rank) for rank, task in enumerate(tasks) if task in late)
        raise RanksError(f"rank {names} has not {done} within {timeout_s:g} s")
    return [task.result() for task in tasks]
