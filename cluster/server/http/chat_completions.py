"""POST /v1/chat/completions."""

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from cluster.engine.sequence import TokenLogprob
from cluster.server.errors import Code, RequestError
from cluster.server.gateway import Gateway
from cluster.server.http.answer import Answer, Choice, Usages, ending
from cluster.server.http.logprobs import chat_logprobs, prompt_logprobs
from cluster.server.http.models import ChatCompletionBody
from cluster.server.http.requests import (
    chat_of,
    includes_usage,
    model_and_preset,
    requests_for,
    sampling_of,
)
from cluster.server.http.streams import EventStream, unless_reader_leaves
from cluster.server.request import Chunk
from cluster.server.tokenizer import TokenTexts

Json = dict[str, Any]


def chat_routes(gateway: Gateway, texts: TokenTexts) -> APIRouter:
    routes = APIRouter()

    @routes.post("/v1/chat/completions")
    async def chat(body: ChatCompletionBody, request: Request) -> Response:
        completion = _ChatCompletion(gateway, texts, body, request)
        if body.stream:
            answer = await completion.begin()
            return EventStream(completion.events(answer), answer)
        return JSONResponse(await unless_reader_leaves(request.receive, completion.whole()))

    return routes


class _ChatCompletion:
    """One call: its body, and how its answer is written."""

    def __init__(
        self, gateway: Gateway, texts: TokenTexts, body: ChatCompletionBody, request: Request
    ) -> None:
        _check(body)
        self._gateway = gateway
        self._texts = texts
        self._body = body
        self._request = request
        self._num_choices = 1 if body.n is None else body.n
        self._head = {
            "id": f"chatcmpl-{request.state.request_id}",
            "created": int(time.time()),
            "model": body.model or gateway.model.name,
        }

    async def begin(self) -> Answer:
        """Raises RequestError if the chat is refused."""
        body = self._body
        model, preset = model_and_preset(body.model, body.preset, self._gateway.model.name)
        chat = chat_of(body.messages, preset, body.add_generation_prompt, body.chat_template_kwargs)
        sampling = sampling_of(body)
        if body.logprobs:
            sampling["logprobs"] = body.top_logprobs or 0
        if body.max_completion_tokens is not None:
            sampling["max_tokens"] = body.max_completion_tokens
        requests = requests_for(self._request, body, [chat], model, sampling)
        return await Answer.begin(self._gateway, requests)

    async def whole(self) -> Json:
        async with aclosing(await self.begin()) as answer:
            answers, usages = await answer.collect(self._num_choices)
        choices = [self._whole_choice(idx, c) for idx, c in enumerate(answers[0].choices)]
        head = {**self._head, "object": "chat.completion"}
        whole = {**head, "choices": choices, "usage": usages.body()}
        if self._body.prompt_logprobs is not None:
            whole["prompt_logprobs"] = prompt_logprobs(self._texts, answers[0].prompt_logprobs)
        return whole

    async def events(self, answer: Answer) -> AsyncGenerator[Json, None]:
        usages = Usages()
        usage = {"usage": None} if includes_usage(self._body) else {}
        head = {**self._head, "object": "chat.completion.chunk"}
        for idx in range(self._num_choices):
            first = {"index": idx, "delta": {"role": "assistant", "content": ""}}
            yield {**head, "choices": [first | _UNFINISHED], **usage}
        async with aclosing(answer.chunks()) as chunks:
            async for _, chunk in chunks:
                usages.add(chunk.usage)
                if chunk.text or chunk.finish or chunk.logprobs or self._body.return_token_ids:
                    yield {**head, "choices": [self._delta(chunk)], **usage}
        if usage:
            yield {**head, "choices": [], "usage": usages.body()}

    def _whole_choice(self, index: int, choice: Choice) -> Json:
        message = {"role": "assistant", "content": choice.text, "refusal": None}
        return {
            "index": index,
            "message": message,
            "logprobs": self._logprobs(choice.logprobs),
            **ending(choice.finish),
            **self._token_ids(choice.token_ids),
        }

    def _delta(self, chunk: Chunk) -> Json:
        return {
            "index": chunk.index,
            "delta": {"content": chunk.text} if chunk.text else {},
            "logprobs": self._logprobs(chunk.logprobs),
            **ending(chunk.finish),
            **self._token_ids(chunk.token_ids),
        }

    def _logprobs(self, logprobs: Sequence[TokenLogprob]) -> Json | None:
        return chat_logprobs(self._texts, logprobs) if self._body.logprobs and logprobs else None

    def _token_ids(self, token_ids: Sequence[int]) -> Json:
        return {"token_ids": list(token_ids)} if self._body.return_token_ids else {}


_UNFINISHED = {"logprobs": None, "finish_reason": None}


def _check(body: ChatCompletionBody) -> None:
    if body.top_logprobs is not None and not body.logprobs:
        raise RequestError(Code.INVALID_ARGUMENT, "top_logprobs needs logprobs: set it to true")
    if body.stream and body.prompt_logprobs is not None:
        raise RequestError(
            Code.INVALID_ARGUMENT, "prompt_logprobs are not streamed: set stream to false"
        )
