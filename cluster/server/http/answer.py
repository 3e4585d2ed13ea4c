"""The gateway's chunks for one HTTP request, which may have several prompts."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass, field

from cluster.engine.sequence import TokenLogprob
from cluster.server.gateway import Gateway
from cluster.server.request import Chunk, Finish, GenerationRequest, PromptInfo, Usage

Chunks = AsyncGenerator[Chunk, None]


@dataclass
class Choice:
    """One completion as far as it has come."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish: Finish | None = None

    def add(self, chunk: Chunk) -> None:
        self.text += chunk.text
        self.token_ids.extend(chunk.token_ids)
        self.logprobs.extend(chunk.logprobs)
        self.finish = chunk.finish or self.finish


@dataclass
class PromptAnswer:
    """All choices of one prompt."""

    choices: list[Choice]
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)


class Answer:
    """Admitted requests, one for each prompt; iterate or `collect`, and `aclose` in any case."""

    def __init__(
        self, stack: AsyncExitStack, streams: list[Chunks], infos: list[PromptInfo]
    ) -> None:
        self._stack = stack
        self._streams = streams
        self.infos = infos

    @staticmethod
    async def begin(gateway: Gateway, requests: Sequence[GenerationRequest]) -> "Answer":
        """Raises RequestError, all admitted ones given up, if one of them is refused."""
        async with AsyncExitStack() as stack:
            streams, infos = [], []
            for request in requests:
                chunks = await stack.enter_async_context(aclosing(gateway.generate(request)))
                first = await anext(chunks)
                assert first.prompt is not None, "the first chunk is about the prompt"
                streams.append(chunks)
                infos.append(first.prompt)
            return Answer(stack.pop_all(), streams, infos)
        raise AssertionError("the stack hides no exception")

    async def chunks(self) -> AsyncGenerator[tuple[int, Chunk], None]:
        """Each with the position of its prompt, as they come; raises RequestError."""
        if len(self._streams) == 1:
            async for chunk in self._streams[0]:
                yield 0, chunk
            return
        # One chunk of each prompt is asked for at a time, so a slow reader holds all of them up.
        waiting = {_ask(chunks): idx for idx, chunks in enumerate(self._streams)}
        try:
            while waiting:
                done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                for asked in done:
                    idx, next_chunk = waiting.pop(asked), asked.result()
                    if next_chunk is not None:
                        waiting[_ask(self._streams[idx])] = idx
                        yield idx, next_chunk
        finally:
            for asked in waiting:
                asked.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)

    async def collect(self, num_choices: int) -> "tuple[list[PromptAnswer], Usages]":
        """The whole answer."""
        answers = [PromptAnswer([Choice() for _ in range(num_choices)]) for _ in self._streams]
        usages = Usages()
        async with aclosing(self.chunks()) as chunks:
            async for prompt_idx, chunk in chunks:
                answers[prompt_idx].choices[chunk.index].add(chunk)
                answers[prompt_idx].prompt_logprobs.extend(chunk.prompt_logprobs)
                usages.add(chunk.usage)
        return answers, usages

    async def aclose(self) -> None:
        """Abort what has not ended."""
        await self._stack.aclose()


class Usages:
    """The tokens of all prompts together, as OpenAI reports them."""

    def __init__(self) -> None:
        self._prompt = self._completion = self._cached = 0

    def add(self, usage: Usage | None) -> None:
        if usage:
            self._prompt += usage.prompt_tokens
            self._completion += usage.completion_tokens
            self._cached += usage.cached_tokens

    def body(self) -> dict[str, object]:
        return {
            "prompt_tokens": self._prompt,
            "completion_tokens": self._completion,
            "total_tokens": self._prompt + self._completion,
            "prompt_tokens_details": {"cached_tokens": self._cached},
        }


def ending(finish: Finish | None) -> dict[str, object]:
    """How a choice ended; null while it goes on. `stop_reason` is the stop string or token that did it."""
    if finish is None:
        return {"finish_reason": None, "stop_reason": None}
    reason = finish.stop_token_id if finish.stop_string is None else finish.stop_string
    return {"finish_reason": finish.reason.value, "stop_reason": reason}


def _ask(chunks: Chunks) -> "asyncio.Task[Chunk | None]":
    async def next_chunk() -> Chunk | None:
        return await anext(chunks, None)

    return asyncio.create_task(next_chunk())
