"""Sends a load to a server over gRPC and notes when each piece of every answer came."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from time import perf_counter

from cluster.server.client import AsyncClient, ClientError
from cluster.server.proto.expertmesh.v1.inference_pb2 import FinishInfo
from simulations.bench.serving_load import Load, Planned
from simulations.bench.serving_outcomes import Outcome

_COMPLETE = (FinishInfo.STOP, FinishInfo.LENGTH)


class Tally:
    """Outcomes so far, of requests that ended and of those under way."""

    def __init__(self) -> None:
        self.outcomes: list[Outcome] = []
        self.start = perf_counter()
        self.num_ended = 0
        self.num_tokens = 0

    @property
    def seconds(self) -> float:
        return perf_counter() - self.start


async def send_load(
    client: AsyncClient, load: Load, planned: Sequence[Planned], tally: Tally
) -> None:
    """Return when every request has ended; cancelling ends those under way as CANCELLED."""
    tally.start = perf_counter()
    async with asyncio.TaskGroup() as tasks:
        if load.concurrency is None:
            await _send_when_due(tasks, client, load, planned, tally)
        else:
            left = iter(enumerate(planned))
            for _ in range(min(load.concurrency, len(planned))):
                tasks.create_task(_user(client, load, left, tally))


async def _send_when_due(
    tasks: asyncio.TaskGroup,
    client: AsyncClient,
    load: Load,
    planned: Sequence[Planned],
    tally: Tally,
) -> None:
    for idx, request in enumerate(planned):
        if (early_s := request.at_s - tally.seconds) > 0:
            await asyncio.sleep(early_s)
        late_s = tally.seconds - request.at_s
        tasks.create_task(_ask(client, load, idx, request, tally, late_s))


async def _user(client: AsyncClient, load: Load, left: enumerate[Planned], tally: Tally) -> None:
    """The next request when the last one has ended, until none are left."""
    for idx, request in left:
        await _ask(client, load, idx, request, tally)


async def _ask(
    client: AsyncClient,
    load: Load,
    idx: int,
    request: Planned,
    tally: Tally,
    late_s: float = 0.0,
) -> None:
    keeps = idx < load.keep_tokens
    outcome = Outcome(
        idx,
        sent_s=tally.seconds,
        late_s=max(0.0, late_s),
        prompt_tokens=len(request.token_ids),
        planned_tokens=request.max_tokens,
        token_ids=[] if keeps else None,
        code="CANCELLED",
        message="had not ended",
    )
    tally.outcomes.append(outcome)
    start = perf_counter()
    try:
        async for chunk in client.generate_stream(
            request.token_ids,
            max_tokens=request.max_tokens,
            temperature=load.temperature,
            seed=request.seed,
            ignore_eos=True,
        ):
            if num := len(chunk.token_ids):
                outcome.chunk_s.append(perf_counter() - start)
                outcome.num_tokens += num
                tally.num_tokens += num
                if outcome.token_ids is not None:
                    outcome.token_ids += chunk.token_ids
            if chunk.HasField("finish"):
                outcome.num_ends += 1
                outcome.code = "" if chunk.finish.reason in _COMPLETE else "ABORTED"
            if chunk.HasField("usage"):
                outcome.cached_tokens = chunk.usage.cached_tokens
        if outcome.num_ends == 0:
            outcome.code, outcome.message = "UNKNOWN", "the stream ended without a finish"
    except ClientError as error:
        outcome.num_ends += 1
        outcome.code, outcome.message = error.code.name, error.message
    finally:
        outcome.end_s = perf_counter() - start
        tally.num_ended += 1
