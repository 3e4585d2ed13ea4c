"""POST /v1/completions."""

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any, NamedTuple, cast

from fastapi import APIRouter, Request
from fastapi.responses import Response

from cluster.engine.sequence import TokenLogprob
from cluster.server.errors import Code, RequestError, invalid
from cluster.server.gateway import Gateway
from cluster.server.http.answer import Answer, Choice, PromptAnswer, Usages, ending
from cluster.server.http.completion_call import CompletionCall
from cluster.server.http.logprobs import CompletionLogprobs, prompt_logprobs
from cluster.server.http.models import CompletionBody
from cluster.server.http.requests import sampling_of
from cluster.server.request import Finish
from cluster.server.tokenizer import TokenTexts

Json = dict[str, Any]


def completion_routes(gateway: Gateway, texts: TokenTexts) -> APIRouter:
    routes = APIRouter()

    @routes.post("/v1/completions")
    async def complete(body: CompletionBody, request: Request) -> Response:
        _check(body)
        return await _Completion(gateway, texts, body, request).response()

    return routes


class _Completion(CompletionCall[CompletionBody]):
    kind, chunk_kind, id_prefix = "text_completion", "text_completion", "cmpl"

    def __init__(
        self, gateway: Gateway, texts: TokenTexts, body: CompletionBody, request: Request
    ) -> None:
        super().__init__(gateway, texts, body, request)
        self._prompts = _prompts(body, gateway.config.server.max_choices)

    def _asked(self) -> tuple[list[str | list[int]], str | None, Json]:
        body = self._body
        sampling = sampling_of(body)
        if body.logprobs is not None:
            sampling["logprobs"] = body.logprobs
            if body.echo:
                sampling.setdefault("prompt_logprobs", body.logprobs)
        return self._prompts, body.model, sampling

    async def _answered(self, answers: Sequence[PromptAnswer]) -> Json:
        choices: list[Json] = []
        for prompt, found in zip(self._prompts, answers, strict=True):
            echo = await self._echo(prompt)
            choices += [
                self._whole_choice(len(choices) + idx, choice, found.prompt_logprobs, echo)
                for idx, choice in enumerate(found.choices)
            ]
        return {"choices": choices}

    async def _pieces(self, answer: Answer, usages: Usages) -> AsyncGenerator[Json, None]:
        shown: dict[int, CompletionLogprobs] = {}
        async with aclosing(answer.chunks()) as chunks:
            async for prompt_idx, chunk in chunks:
                usages.add(chunk.usage)
                index = prompt_idx * self._num_choices + chunk.index
                text = chunk.text
                if index not in shown:
                    shown[index] = CompletionLogprobs(self._texts)
                    text = (await self._echo(self._prompts[prompt_idx])).text + text
                if not (text or chunk.finish or chunk.logprobs or self._body.return_token_ids):
                    continue  # a part of a character
                choice = self._choice(index, text, chunk.token_ids, chunk.finish)
                if chunk.logprobs:
                    choice["logprobs"] = shown[index].body(chunk.token_ids, chunk.logprobs)
                yield choice

    def _whole_choice(
        self, index: int, choice: Choice, of_prompt: Sequence[TokenLogprob], echo: "_Echo"
    ) -> Json:
        shown = self._choice(index, echo.text + choice.text, choice.token_ids, choice.finish)
        if choice.logprobs:
            prompt = [None, *of_prompt] if echo.token_ids else []
            shown["logprobs"] = CompletionLogprobs(self._texts).body(
                [*echo.token_ids, *choice.token_ids], [*prompt, *choice.logprobs]
            )
        if self._body.prompt_logprobs is not None:
            shown["prompt_logprobs"] = prompt_logprobs(self._texts, of_prompt)
        return shown

    def _choice(
        self, index: int, text: str, token_ids: Sequence[int], finish: Finish | None
    ) -> Json:
        ids = self._token_ids(token_ids)
        return {"index": index, "text": text, "logprobs": None, **ending(finish), **ids}

    async def _echo(self, prompt: str | list[int]) -> "_Echo":
        """What of the prompt stands before each completion: all of it or nothing."""
        if not self._body.echo:
            return _Echo("", [])
        if isinstance(prompt, str):
            return _Echo(prompt, await self._gateway.tokenize(prompt))
        decode = self._gateway.tokenizer.decode if self._gateway.tokenizer else None
        return _Echo(decode(prompt, skip_special_tokens=False) if decode else "", prompt)


class _Echo(NamedTuple):
    text: str
    token_ids: list[int]


def _check(body: CompletionBody) -> None:
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise invalid("best_of", body.best_of, "the same as n: no completion is left out")
    if body.stream and body.echo and body.logprobs is not None:
        raise RequestError(
            Code.INVALID_ARGUMENT, "echo with logprobs is not streamed: set stream to false"
        )


def _prompts(body: CompletionBody, most: int) -> list[str | list[int]]:
    """One text, one list of ids, or a list of either."""
    prompt = body.prompt
    if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)):
        return [prompt]
    if not 1 <= len(prompt) <= most:
        raise RequestError(
            Code.INVALID_ARGUMENT,
            f"prompt must have 1 to {most} texts or lists of token ids (server.max_choices), "
            f"got {len(prompt)}",
        )
    return cast("list[str | list[int]]", prompt)
