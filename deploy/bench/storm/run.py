"""A whole storm: many clients at once, among them requests that nobody disturbs, and the calm after it."""

import asyncio
import math
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from cluster.server.client import AsyncClient, ClientError
from deploy.bench.storm.kinds import OUR_FAULT, Client, Target

SETTLE_S = 60.0
CALLS_PER_CHANNEL = 2000
_SENTINELS: tuple[tuple[Any, dict[str, Any]], ...] = (
    ("It was a bright cold morning, and", {"temperature": 0.0, "max_tokens": 24}),
    ("def fibonacci(n):", {"temperature": 0.9, "top_p": 0.95, "seed": 7, "max_tokens": 24}),
    ([5, 6, 7, 8, 9] * 7, {"temperature": 0.7, "seed": 1, "max_tokens": 16}),
)
_NEVER = {*OUR_FAULT, "500", "502", "503"}


@dataclass
class Outcome:
    """What came of a storm. `complaints`: everything that should not have happened; empty is good."""

    ended: dict[str, Counter[str]] = field(default_factory=dict)
    """By kind of trouble: how its requests ended."""
    num_sentinels: int = 0
    seconds: float = 0.0
    settled_s: float | None = None
    """Until the server held nothing of them any more."""
    complaints: Counter[str] = field(default_factory=Counter)

    @property
    def num_requests(self) -> int:
        return sum(sum(ended.values()) for ended in self.ended.values())

    def count(self, kind: str, ended: str) -> None:
        self.ended.setdefault(kind, Counter())[ended] += 1
        late = ended == "DEADLINE_EXCEEDED" and kind != "deadline"
        unasked = ended == "CANCELLED" and kind != "unary cancelled"
        if late or unasked or ended.partition(":")[0] in _NEVER:
            self.complaints[f"{kind}: {ended}"] += 1


async def storm(
    target: Target,
    num_requests: int,
    concurrency: int,
    seed: int,
    on_progress: Callable[[Outcome], None] = lambda outcome: None,
    limit_s: float = math.inf,
) -> Outcome:
    """Returns when all requests have ended and the server is idle again, or has had time enough.

    limit_s: no request begins later.
    """
    outcome = Outcome()
    async with AsyncClient(target.endpoint, 120.0) as client:
        expected = [await _answer(client, *sentinel) for sentinel in _SENTINELS]
        begun = time.monotonic()
        watching = asyncio.create_task(_watch(client, expected, outcome, on_progress))
        left = _until(begun + limit_s, num_requests)
        async with asyncio.TaskGroup() as clients:
            for number in range(concurrency):
                clients.create_task(
                    _trouble(target, left, random.Random(f"{seed}/{number}"), outcome)
                )
        outcome.seconds = time.monotonic() - begun
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
        await _settle(client, outcome)
        for sentinel, tokens in zip(_SENTINELS, expected, strict=True):
            await _check(client, sentinel, tokens, outcome)
    return outcome


def _until(deadline: float, count: int) -> Iterator[int]:
    for number in range(count):
        if time.monotonic() > deadline:
            return
        yield number


async def _trouble(target: Target, left: Any, chance: random.Random, outcome: Outcome) -> None:
    """One client after another, until no requests are left."""
    while True:
        client = Client(target, chance)
        try:
            for _ in range(CALLS_PER_CHANNEL):
                if next(left, None) is None:
                    return
                try:
                    kind, ended = await client.once()
                except (OSError, TimeoutError) as error:
                    kind, ended = "connection", type(error).__name__
                    outcome.complaints[f"{kind}: {error!r:.100}"] += 1
                outcome.count(kind, ended)
        finally:
            await client.close()


async def _watch(
    client: AsyncClient,
    expected: Sequence[list[int]],
    outcome: Outcome,
    on_progress: Callable[[Outcome], None],
) -> None:
    """Sentinels one after the other, as long as the storm lasts."""
    while True:
        for sentinel, tokens in zip(_SENTINELS, expected, strict=True):
            await _check(client, sentinel, tokens, outcome)
            on_progress(outcome)


async def _check(
    client: AsyncClient, sentinel: tuple[Any, dict[str, Any]], tokens: list[int], outcome: Outcome
) -> None:
    try:
        got = await _answer(client, *sentinel)
    except ClientError as error:
        outcome.complaints[f"undisturbed request: {error!s:.200}"] += 1
        return
    outcome.num_sentinels += 1
    if got != tokens:
        outcome.complaints[f"undisturbed request: other tokens: {got} instead of {tokens}"] += 1


async def _answer(client: AsyncClient, prompt: Any, options: dict[str, Any]) -> list[int]:
    return list((await client.generate(prompt, **options)).token_ids)


async def _settle(client: AsyncClient, outcome: Outcome) -> None:
    """Every sequence and every block given back."""
    begun = time.monotonic()
    while True:
        replicas = (await client.loads()).replicas
        held = [
            f"replica {load.replica}: {load.in_flight} in flight, {load.running} running, "
            f"{load.waiting} waiting, {load.kv_blocks_used} blocks used"
            for load in replicas
            if load.in_flight or load.running or load.waiting or load.kv_blocks_used
        ]
        if not held:
            outcome.settled_s = time.monotonic() - begun
            return
        if time.monotonic() - begun > SETTLE_S:
            outcome.complaints.update(f"still after {SETTLE_S:g} s: {text}" for text in held)
            return
        await asyncio.sleep(0.1)
