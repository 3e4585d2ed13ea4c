"""Where plans are made, so that nobody waits for them.

A thread does for small ones. Those of large models take seconds of Python, in which a thread would
keep the interpreter, and with it the streams of all clients, waiting: a Ray task has its own.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from typing import Any, Protocol

import ray

from cluster.rebalance_draft import Draft, draft
from router.load import ExpertLoad
from router.placement import Placement

SMALL = 2048
"""Slots of all layers together; so many are planned in about a tenth of a second."""


class Drafting(Protocol):
    """`rebalance_draft.draft` made elsewhere."""

    async def __call__(
        self,
        load: ExpertLoad,
        current: Placement,
        *,
        target: float,
        node_traffic: float = 0.0,
        from_scratch: bool = False,
        only: Collection[int] | None = None,
    ) -> Draft: ...


async def draft_aside(load: ExpertLoad, current: Placement, **options: Any) -> Draft:
    """In a thread if small, else in a process of the Ray cluster that we are part of."""
    if current.physical_to_logical.size <= SMALL:
        return await asyncio.to_thread(draft, load, current, **options)
    task: Any = ray.remote(draft)  # type: ignore[arg-type]  # Ray's stubs know no keyword arguments
    drafted: Draft = await task.options(num_cpus=0, max_retries=0).remote(load, current, **options)
    return drafted
