"""From the bodies of HTTP requests to the gateway's own, whose values the gateway judges."""

import json
import time
from collections.abc import Sequence
from typing import Any

from starlette.requests import Request

from cluster.server.errors import Code, RequestError, invalid
from cluster.server.http.models import GenerationBody, Json, Message, ResponseFormat
from cluster.server.request import Chat, ChatMessage, GenerationRequest

_MAX_TIMEOUT_S = 86_400
_SAME_NAME = (
    "temperature",
    "top_p",
    "min_p",
    "seed",
    "max_tokens",
    "frequency_penalty",
    "presence_penalty",
    "repetition_penalty",
    "min_tokens",
    "ignore_eos",
    "stop_token_ids",
    "skip_special_tokens",
    "allowed_token_ids",
    "bad_words",
    "prompt_logprobs",
)


def requests_for(
    request: Request,
    body: GenerationBody,
    prompts: Sequence[str | Sequence[int] | Chat],
    model: str | None,
    sampling: Json,
) -> list[GenerationRequest]:
    """One for each prompt; where there are several, their position is part of their ids.

    Raises RequestError where `X-Request-Timeout` is no time, or is over.
    """
    request_id: str = request.state.request_id
    deadline_s = _time_left(request)
    return [
        GenerationRequest(
            prompt=prompt,
            request_id=request_id if len(prompts) == 1 else f"{request_id}-{idx}",
            model=model,
            deadline_s=deadline_s,
            sampling=sampling,
            n=1 if body.n is None else body.n,
            priority=body.priority or 0,
            cache_salt=body.cache_salt or "",
            traceparent=request.headers.get("traceparent"),
        )
        for idx, prompt in enumerate(prompts)
    ]


def sampling_of(body: GenerationBody) -> Json:
    """Fields of SamplingParams that the client set."""
    sampling = {name: getattr(body, name) for name in _SAME_NAME}
    sampling["stop"] = [body.stop] if isinstance(body.stop, str) else body.stop
    sampling["top_k"] = 0 if body.top_k == -1 else body.top_k  # -1: all, as vLLM says it
    sampling["include_stop_string"] = body.include_stop_str_in_output
    sampling["constraint"] = _constraint(body)
    sampling["logit_bias"] = _logit_bias(body.logit_bias)
    return {name: value for name, value in sampling.items() if value is not None}


def includes_usage(body: GenerationBody) -> bool:
    return body.stream_options is not None and body.stream_options.include_usage


def chat_of(
    messages: Sequence[Message],
    preset: str | None,
    add_generation_prompt: bool | None,
    template_options: Json | None,
) -> Chat:
    return Chat(
        messages=tuple(
            ChatMessage(role=message.role, content=_text(message), name=message.name)
            for message in messages
        ),
        preset=preset,
        add_generation_prompt=add_generation_prompt is not False,
        template_options=template_options or {},
    )


def model_and_preset(
    model: str | None, preset: str | None, served: str
) -> tuple[str | None, str | None]:
    """`MODEL:PRESET` is how clients choose a preset that know nothing but models."""
    if model is not None and model.startswith(f"{served}:"):
        return served, preset or model.removeprefix(f"{served}:")
    return model, preset


def _time_left(request: Request) -> float | None:
    """Seconds that the client still wants to wait, who counts from when it asked."""
    header = request.headers.get("x-request-timeout")
    if header is None:
        return None
    try:
        timeout_s = float(header)
    except ValueError:
        timeout_s = 0.0
    if not 0 < timeout_s <= _MAX_TIMEOUT_S:
        raise invalid("x-request-timeout", header, f"seconds, above 0 and up to {_MAX_TIMEOUT_S}")
    arrived: float = request.state.arrived
    left_s = arrived + timeout_s - time.monotonic()
    if left_s <= 0:
        raise RequestError(
            Code.DEADLINE_EXCEEDED, f"the body took longer than x-request-timeout = {timeout_s:g} s"
        )
    return left_s


def _text(message: Message) -> str:
    if isinstance(message.content, list):
        return "".join(part.text for part in message.content)
    return message.content or ""


def _logit_bias(biases: dict[str, float] | None) -> dict[int, float] | None:
    if biases is None:
        return None
    try:
        return {int(token_id): bias for token_id, bias in biases.items()}
    except ValueError as error:
        raise RequestError(Code.INVALID_ARGUMENT, f"logit_bias must have ids: {error}") from None


def _constraint(body: GenerationBody) -> Json | None:
    wanted = body.structured_outputs
    named: list[tuple[str, str, Any]] = [
        ("response_format", "json_schema", _schema(body.response_format)),
        ("guided_json", "json_schema", body.guided_json),
        ("guided_regex", "regex", body.guided_regex),
        ("guided_choice", "choices", body.guided_choice),
        ("guided_grammar", "grammar", body.guided_grammar),
        ("structured_outputs.json", "json_schema", wanted and wanted.json_),
        ("structured_outputs.regex", "regex", wanted and wanted.regex),
        ("structured_outputs.choice", "choices", wanted and wanted.choice),
        ("structured_outputs.grammar", "grammar", wanted and wanted.grammar),
    ]
    given = [(name, kind, value) for name, kind, value in named if value is not None]
    if len(given) > 1:
        names = " and ".join(name for name, _, _ in given[:2])
        raise RequestError(
            Code.INVALID_ARGUMENT, f"{names} are both given: a completion follows one of them"
        )
    for _, kind, value in given:
        return {"kind": kind, "text": value if isinstance(value, str) else json.dumps(value)}
    return None


def _schema(response_format: ResponseFormat | None) -> Json | None:
    if response_format is None or response_format.type == "text":
        return None
    if response_format.type == "json_object":
        return {"type": "object"}
    if response_format.json_schema is None:
        raise RequestError(
            Code.INVALID_ARGUMENT,
            "response_format = 'json_schema' needs a schema: set response_format.json_schema.schema",
        )
    return response_format.json_schema.schema_
