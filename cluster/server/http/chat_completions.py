"""POST /v1/chat/completions."""

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from cluster.engine.sequence import TokenLogprob
from cluster.server.errors import Code, RequestError
from cluster.server.gateway import Gateway
from cluster.server.http.answer import Answer, Choice, PromptAnswer, Usages, ending
from cluster.server.http.completion_call import CompletionCall
from cluster.server.http.logprobs import chat_logprobs, prompt_logprobs
from cluster.server.http.models import ChatCompletionBody
from cluster.server.http.requests import chat_of, model_and_preset, sampling_of
from cluster.server.request import Chat, Chunk
from cluster.server.tokenizer import TokenTexts

Json = dict[str, Any]


def chat_routes(gateway: Gateway, texts: TokenTexts) -> APIRouter:
    routes = APIRouter()

    @routes.post("/v1/chat/completions")
    async def chat(body: ChatCompletionBody, request: Request) -> Response:
        _check(body)
        return await _ChatCompletion(gateway, texts, body, request).response()

    return routes


class _ChatCompletion(CompletionCall[ChatCompletionBody]):
    kind, chunk_kind, id_prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def _asked(self) -> tuple[list[Chat], str | None, Json]:
        body = self._body
        model, preset = model_and_preset(body.model, body.preset, self._gateway.model.name)
        chat = chat_of(body.messages, preset, body.add_generation_prompt, body.chat_template_kwargs)
        sampling = sampling_of(body)
        if body.logprobs:
            sampling["logprobs"] = body.top_logprobs or 0
        if body.max_completion_tokens is not None:
            sampling["max_tokens"] = body.max_completion_tokens
        return [chat], model, sampling

    async def _answered(self, answers: Sequence[PromptAnswer]) -> Json:
        (found,) = answers
        answer: Json = {"choices": [self._choice(i, c) for i, c in enumerate(found.choices)]}
        if self._body.prompt_logprobs is not None:
            answer["prompt_logprobs"] = prompt_logprobs(self._texts, found.prompt_logprobs)
        return answer

    async def _pieces(self, answer: Answer, usages: Usages) -> AsyncGenerator[Json, None]:
        for idx in range(self._num_choices):
            first = {"index": idx, "delta": {"role": "assistant", "content": ""}}
            yield first | _UNFINISHED
        async with aclosing(answer.chunks()) as chunks:
            async for _, chunk in chunks:
                usages.add(chunk.usage)
                if chunk.text or chunk.finish or chunk.logprobs or self._body.return_token_ids:
                    yield self._delta(chunk)

    def _choice(self, index: int, choice: Choice) -> Json:
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


_UNFINISHED = {"logprobs": None, "finish_reason": None}


def _check(body: ChatCompletionBody) -> None:
    if body.top_logprobs is not None and not body.logprobs:
        raise RequestError(Code.INVALID_ARGUMENT, "top_logprobs needs logprobs: set it to true")
