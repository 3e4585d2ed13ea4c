"""What calls for completions of both kinds have in common: how one begins, and in which form it is answered."""

import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any, Generic, TypeVar

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from cluster.server.errors import Code, RequestError
from cluster.server.gateway import Gateway
from cluster.server.http.answer import Answer, PromptAnswer, Usages
from cluster.server.http.models import GenerationBody
from cluster.server.http.requests import includes_usage, requests_for
from cluster.server.http.streams import EventStream, unless_reader_leaves
from cluster.server.request import Chat
from cluster.server.tokenizer import TokenTexts

Json = dict[str, Any]
Body = TypeVar("Body", bound=GenerationBody)


class CompletionCall(ABC, Generic[Body]):
    """One call: its body, and how its answer is written.

    `kind` and `chunk_kind` are what OpenAI calls a whole answer and a piece of a stream, `id_prefix`
    begins their ids.
    """

    kind: str
    chunk_kind: str
    id_prefix: str

    def __init__(self, gateway: Gateway, texts: TokenTexts, body: Body, request: Request) -> None:
        self._gateway = gateway
        self._texts = texts
        self._body = body
        self._request = request
        self._num_choices = 1 if body.n is None else body.n
        self._head = {
            "id": f"{self.id_prefix}-{request.state.request_id}",
            "created": int(time.time()),
            "model": body.model or gateway.model.name,
        }

    async def response(self) -> Response:
        """Raises RequestError if the call is refused, or fails before the answer has begun."""
        if self._body.stream:
            if self._body.prompt_logprobs is not None:
                raise RequestError(
                    Code.INVALID_ARGUMENT, "prompt_logprobs are not streamed: set stream to false"
                )
            answer = await self._begin()
            return EventStream(self._events(answer), answer)
        return JSONResponse(await unless_reader_leaves(self._request.receive, self._whole()))

    @abstractmethod
    def _asked(self) -> tuple[Sequence[str | list[int] | Chat], str | None, Json]:
        """Prompts, the model that was named, and fields of SamplingParams that were set."""

    @abstractmethod
    async def _answered(self, answers: Sequence[PromptAnswer]) -> Json:
        """What a whole answer has besides its head and usage: `choices` above all."""

    @abstractmethod
    def _pieces(self, answer: Answer, usages: Usages) -> AsyncGenerator[Json, None]:
        """Choices of a stream as they grow; counts what they cost in `usages`."""

    async def _begin(self) -> Answer:
        prompts, model, sampling = self._asked()
        requests = requests_for(self._request, self._body, prompts, model, sampling)
        return await Answer.begin(self._gateway, requests)

    async def _whole(self) -> Json:
        async with aclosing(await self._begin()) as answer:
            answers, usages = await answer.collect(self._num_choices)
        head = {**self._head, "object": self.kind}
        return {**head, **await self._answered(answers), "usage": usages.body()}

    async def _events(self, answer: Answer) -> AsyncGenerator[Json, None]:
        usages = Usages()
        usage = {"usage": None} if includes_usage(self._body) else {}
        head = {**self._head, "object": self.chunk_kind}
        async with aclosing(self._pieces(answer, usages)) as pieces:
            async for choice in pieces:
                yield {**head, "choices": [choice], **usage}
        if usage:
            yield {**head, "choices": [], "usage": usages.body()}

    def _token_ids(self, token_ids: Sequence[int]) -> Json:
        return {"token_ids": list(token_ids)} if self._body.return_token_ids else {}
