"""One admitted request: what it asked, what it has got so far, and what its reader has not seen."""

import asyncio
import time

from tokenizers import Tokenizer

from cluster.engine.detokenizer import Detokenizer
from cluster.engine.sequence import SamplingParams
from cluster.server.errors import RequestError
from cluster.server.request import Chunk, Finish, FinishReason, PromptInfo, Usage
from cluster.server.wire import Event


class InFlight:
    """State of one request; the gateway feeds it, one reader takes chunks out of it.

    `token_ids` keeps every token since the beginning: with the prompt, parameters and seed it is
    all that another replica would need to go on with the same tokens.
    """

    def __init__(
        self,
        info: PromptInfo,
        prompt_ids: list[int],
        params: SamplingParams,
        tokenizer: Tokenizer | None,
        arrived: float,
    ) -> None:
        self.info = info
        self.prompt_ids = prompt_ids
        self.params = params
        self.token_ids: list[int] = []
        self.last_heard = time.monotonic()
        self.deadline: asyncio.TimerHandle | None = None
        self._arrived = arrived
        self._first_token_at: float | None = None
        self._detokenizer = (
            Detokenizer(tokenizer, stop=params.stop, prompt_token_ids=prompt_ids)
            if tokenizer
            else None
        )
        self._text: list[str] = []
        self._num_taken = 0
        self._finish: Finish | None = None
        self._error: RequestError | None = None
        self._news = asyncio.Event()

    @property
    def num_unread(self) -> int:
        return len(self.token_ids) - self._num_taken

    def accept(self, event: Event) -> Finish | None:
        """Take in one event of the engine; returns how the request finished, if it did.

        A stop string that completes here finishes the request although the engine goes on.
        """
        now = self.last_heard = time.monotonic()
        finish = None
        if event.token_id is not None:
            self._first_token_at = self._first_token_at or now
            self.token_ids.append(event.token_id)
            if event.token_id != event.stop_token_id:
                finish = self._detokenize(event.token_id)
        if finish is None and event.finish_reason is not None:
            finish = self._finish_of(event)
        self._news.set()
        return finish

    def end(self, finish: Finish | None = None, error: RequestError | None = None) -> None:
        """Nothing more will come; the reader gets what is left, then `finish` or `error`."""
        if finish and self._detokenizer:
            self._text.append(self._detokenizer.finish())
            # Text held back until now can still complete a stop string.
            finish = self._stop_string_finish() or finish
        self._finish, self._error = finish, error
        self._news.set()

    async def next_chunk(self) -> Chunk:
        """Everything since the last call, waiting for news; at last `finish`, or raises the error.

        There is always an end to wait for: the gateway ends requests of silent replicas.
        """
        await self._news.wait()
        if self._error is None:
            self._news.clear()
        elif self.num_unread == 0:
            raise self._error
        new_ids = tuple(self.token_ids[self._num_taken :])
        self._num_taken = len(self.token_ids)
        text = "".join(self._text)
        self._text.clear()
        usage = self._usage() if self._finish else None
        return Chunk(text=text, token_ids=new_ids, finish=self._finish, usage=usage)

    def _detokenize(self, token_id: int) -> Finish | None:
        if self._detokenizer is None:
            return None
        self._text.append(self._detokenizer.add(token_id))
        return self._stop_string_finish()

    def _stop_string_finish(self) -> Finish | None:
        if self._detokenizer is None or self._detokenizer.stop_string is None:
            return None
        return Finish(reason=FinishReason.STOP, stop_string=self._detokenizer.stop_string)

    def _finish_of(self, event: Event) -> Finish:
        reason = FinishReason(event.finish_reason or "")
        if event.stop_token_id is None:
            return Finish(reason=reason)
        if event.stop_token_id in self.params.stop_token_ids:
            return Finish(reason=reason, stop_token_id=event.stop_token_id)
        return Finish(reason=reason, eos_token_id=event.stop_token_id)

    def _usage(self) -> Usage:
        now = time.monotonic()
        return Usage(
            prompt_tokens=len(self.prompt_ids),
            completion_tokens=len(self.token_ids),
            ttft_ms=1e3 * ((self._first_token_at or now) - self._arrived),
            total_ms=1e3 * (now - self._arrived),
        )
