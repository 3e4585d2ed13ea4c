"""Messages of service Inference, and what they are in the words of the gateway."""

import json
from collections.abc import Sequence
from typing import Any

from cluster.engine.sequence import RoutedExperts, TokenLogprob
from cluster.server.proto.expertmesh.v1 import inference_pb2 as pb
from cluster.server.request import (
    Chat,
    ChatMessage,
    Chunk,
    Finish,
    GenerationRequest,
    PromptInfo,
    Usage,
)

_CONVERTED = ("logit_bias", "constraint")


def read_request(
    request: pb.GenerateRequest, deadline_s: float | None, traceparent: str | None = None
) -> GenerationRequest:
    """The request as every front end says it; values are not judged here."""
    return GenerationRequest(
        prompt=_prompt(request),
        request_id=_given(request, "request_id"),
        model=_given(request, "model"),
        replica=_given(request, "data_parallel_rank"),
        deadline_s=deadline_s,
        sampling=_sampling(request),
        n=request.n if request.HasField("n") else 1,
        priority=request.priority,
        cache_salt=request.cache_salt,
        return_routed_experts=request.return_routed_experts,
        traceparent=traceparent,
    )


def read_chat(chat: pb.ChatMessages) -> Chat:
    return Chat(
        messages=tuple(
            ChatMessage(role=one.role, content=one.content, name=_given(one, "name"))
            for one in chat.messages
        ),
        preset=_given(chat, "preset"),
    )


def chunk_message(chunk: Chunk) -> pb.GenerateChunk:
    message = pb.GenerateChunk(text=chunk.text, token_ids=chunk.token_ids, index=chunk.index)
    if chunk.prompt:
        message.prompt.CopyFrom(_prompt_message(chunk.prompt))
    if chunk.finish:
        message.finish.CopyFrom(_finish_message(chunk.finish))
    if chunk.usage:
        message.usage.CopyFrom(_usage_message(chunk.usage))
    if chunk.logprobs:
        message.logprobs.extend(_logprob_messages(chunk.logprobs))
    if chunk.prompt_logprobs:
        message.prompt_logprobs.extend(_logprob_messages(chunk.prompt_logprobs))
    if chunk.routed_experts:
        message.routed_experts.extend(_routing_messages(chunk.routed_experts))
    return message


class Answer:
    """All chunks of a request as one message."""

    def __init__(self) -> None:
        self._response = pb.GenerateResponse()
        self._texts: dict[int, list[str]] = {}
        self._more: dict[int, pb.Choice] = {}

    def add(self, chunk: Chunk) -> None:
        response = self._response
        choice = response if chunk.index == 0 else self._choice(chunk.index)
        self._texts.setdefault(chunk.index, []).append(chunk.text)
        choice.token_ids.extend(chunk.token_ids)
        choice.logprobs.extend(_logprob_messages(chunk.logprobs))
        choice.routed_experts.extend(_routing_messages(chunk.routed_experts))
        if chunk.finish:
            choice.finish.CopyFrom(_finish_message(chunk.finish))
        response.prompt_logprobs.extend(_logprob_messages(chunk.prompt_logprobs))
        if chunk.prompt:
            response.prompt.CopyFrom(_prompt_message(chunk.prompt))
        if chunk.usage:
            response.usage.CopyFrom(_usage_message(chunk.usage))

    def message(self) -> pb.GenerateResponse:
        self._response.text = "".join(self._texts.get(0, ()))
        for index, choice in sorted(self._more.items()):
            choice.text = "".join(self._texts[index])
            self._response.more_choices.append(choice)
        return self._response

    def _choice(self, index: int) -> pb.Choice:
        if index not in self._more:
            self._more[index] = pb.Choice(index=index)
        return self._more[index]


def _prompt(request: pb.GenerateRequest) -> str | Sequence[int] | Chat | None:
    match request.WhichOneof("prompt"):
        case "text":
            return request.text
        case "token_ids":
            return request.token_ids.ids
        case "messages":
            return read_chat(request.messages)
        case _:
            return None


def _sampling(request: pb.GenerateRequest) -> dict[str, Any]:
    """What the client has set; a list without entries is one that it has not."""
    sent = request.sampling
    values: dict[str, Any] = {
        field.name: value for field, value in sent.ListFields() if field.name not in _CONVERTED
    }
    if sent.logit_bias:
        values["logit_bias"] = dict(sent.logit_bias)
    if sent.HasField("constraint"):
        values["constraint"] = _constraint(sent.constraint)
    for name in ("logprobs", "prompt_logprobs"):
        if request.HasField(name):
            values[name] = getattr(request, name)
    return values


def _constraint(sent: pb.Constraint) -> dict[str, Any]:
    kind = sent.WhichOneof("kind")
    if kind == "choices":
        return {"kind": kind, "text": json.dumps(list(sent.choices.texts))}
    return {"kind": kind, "text": getattr(sent, kind) if kind else ""}


def _given(message: Any, field: str) -> Any:
    return getattr(message, field) if message.HasField(field) else None


def _prompt_message(info: PromptInfo) -> pb.PromptInfo:
    return pb.PromptInfo(
        request_id=info.request_id,
        num_tokens=info.num_tokens,
        seed=info.seed,
        data_parallel_rank=info.replica,
        max_tokens=info.max_tokens,
        text=info.text,
    )


def _finish_message(finish: Finish) -> pb.FinishInfo:
    return pb.FinishInfo(
        reason=finish.reason.name,
        stop_token_id=finish.stop_token_id,
        eos_token_id=finish.eos_token_id,
        stop_string=finish.stop_string,
    )


def _usage_message(usage: Usage) -> pb.Usage:
    return pb.Usage(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        ttft_ms=usage.ttft_ms,
        total_ms=usage.total_ms,
        cached_tokens=usage.cached_tokens,
        queue_ms=usage.queue_ms,
    )


def _logprob_messages(logprobs: Sequence[TokenLogprob]) -> list[pb.TokenLogprob]:
    return [pb.TokenLogprob(**one._asdict()) for one in logprobs]


def _routing_messages(routed: Sequence[RoutedExperts]) -> list[pb.RoutedExperts]:
    return [pb.RoutedExperts(**one._asdict()) for one in routed]
