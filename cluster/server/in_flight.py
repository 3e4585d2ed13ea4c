"""One admitted request: what it asked, its choices, and what its reader has not seen."""

import asyncio
import time
from collections import deque
from collections.abc import Sequence

from cluster.engine.sampling_params import SamplingParams
from cluster.engine.sequence import TokenEvent
from cluster.server.choice import Choice
from cluster.server.errors import RequestError
from cluster.server.request import Chunk, Finish, PromptInfo, Usage


class InFlight:
    """State of one request; the gateway feeds its choices, one reader takes chunks out of it.

    Times are `time.monotonic()` seconds.
    """

    def __init__(
        self,
        info: PromptInfo,
        params: SamplingParams,
        choices: Sequence[Choice],
        arrived: float,
        traceparent: str | None = None,
    ) -> None:
        self.info = info
        self.params = params
        """Of the first choice; the others differ in their seed."""
        self.choices = choices
        self.traceparent = traceparent
        self.arrived = arrived
        self.sent_at = self.last_heard = time.monotonic()
        self.first_token_at: float | None = None
        self.last_token_at: float | None = None
        self.cached_tokens = 0
        """Of the prompt, found in the cache by the first choice."""
        self.queue_ms: float | None = None
        """From arrival until the engine began with the first choice; None before."""
        self.deadline: asyncio.TimerHandle | None = None
        self.num_unread = 0
        """Tokens that the reader has not seen."""
        self._ready: deque[Choice] = deque()
        """Choices that have news."""
        self._num_unfinished = len(choices)
        self._error: RequestError | None = None
        self._reader: asyncio.Future[None] | None = None
        """The reader, where it waits for news."""

    @property
    def num_choices(self) -> int:
        return len(self.choices)

    @property
    def num_completion_tokens(self) -> int:
        """Of all choices together."""
        return sum(len(choice.token_ids) for choice in self.choices)

    @property
    def all_finished(self) -> bool:
        return self._num_unfinished == 0

    @property
    def outcome(self) -> str:
        """Why the first choice finished, in the word of its finish reason."""
        finish = self.choices[0].finish
        assert finish is not None, "asked for once all have finished"
        return finish.reason.value

    def clock(self, choice: Choice, now: float) -> float | None:
        """Note a token of a choice; seconds since the one before, None for its first."""
        since = None if choice.last_token_at is None else now - choice.last_token_at
        choice.last_token_at = self.last_token_at = now
        if self.first_token_at is None:
            self.first_token_at = now
        return since

    def accept(self, choice: Choice, event: TokenEvent) -> Finish | None:
        """Take in one event of the engine; returns how the choice is to finish, if it is."""
        finish = choice.accept(event)
        if event.token_id is not None:
            self.num_unread += 1
        if choice.index == 0:
            if event.cached_tokens is not None:
                self.cached_tokens = event.cached_tokens
            if event.queue_ms is not None:
                self.queue_ms = 1e3 * (self.sent_at - self.arrived) + event.queue_ms
        self._announce(choice)
        return finish

    def finish(self, choice: Choice, finish: Finish) -> None:
        """Nothing more will come for this choice."""
        choice.end(finish)
        self._num_unfinished -= 1
        self._announce(choice)

    def fail(self, error: RequestError) -> None:
        """Nothing more will come at all; the reader gets what is left, then the error."""
        self._error = error
        self._wake()

    async def next_chunk(self) -> Chunk:
        """What is new of one choice, waiting for news; the very last with `usage`, or raises the error.

        There is always an end to wait for: the gateway ends requests of silent replicas.
        """
        while not self._ready:
            if self._error is not None:
                raise self._error
            self._reader = asyncio.get_running_loop().create_future()
            await self._reader
        choice = self._ready.popleft()
        choice.queued = False
        chunk = choice.take()
        self.num_unread -= len(chunk.token_ids)
        if self.all_finished and not self._ready:
            chunk.usage = self._usage()
        return chunk

    def _announce(self, choice: Choice) -> None:
        if not choice.queued:
            choice.queued = True
            self._ready.append(choice)
            self._wake()

    def _wake(self) -> None:
        reader, self._reader = self._reader, None
        if reader is not None and not reader.done():
            reader.set_result(None)

    def _usage(self) -> Usage:
        now = time.monotonic()
        return Usage(
            prompt_tokens=self.info.num_tokens,
            completion_tokens=self.num_completion_tokens,
            ttft_ms=1e3 * ((self.first_token_at or now) - self.arrived),
            total_ms=1e3 * (now - self.arrived),
            cached_tokens=self.cached_tokens,
            queue_ms=1e3 * (now - self.arrived) if self.queue_ms is None else self.queue_ms,
        )
