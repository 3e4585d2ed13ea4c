"""Messages of the API from what people write: text, token ids or a chat, and options by name."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from cluster.server.client.error import ClientError
from cluster.server.errors import Code
from cluster.server.proto.expertmesh.v1 import inference_pb2 as pb

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]
"""Text, token ids, or messages such as {"role": "user", "content": "Hello"}."""

_CONSTRAINTS = ("json_schema", "regex", "grammar", "choices")
_SAMPLING = {field.name for field in pb.SamplingParams.DESCRIPTOR.fields} - {"constraint"}
_REQUEST = {field.name for field in pb.GenerateRequest.DESCRIPTOR.fields} - {
    "text", "token_ids", "messages", "sampling"
}  # fmt: skip
_CHAT = {field.name for field in pb.ChatMessages.DESCRIPTOR.fields} - {"messages"}


def build_request(prompt: Prompt, **options: Any) -> pb.GenerateRequest:
    """The message for a prompt and options: fields of GenerateRequest, SamplingParams and ChatMessages
    in inference.proto by their names, and at most one of json_schema (also as a dict), regex, grammar
    and choices. None stands for the default.

    Raises ClientError (INVALID_ARGUMENT) for what cannot even be written into the message.
    """
    given = {name: value for name, value in options.items() if value is not None}
    try:
        sampling = _sampling(given)
        chat = _take(given, _CHAT)
        request = pb.GenerateRequest(sampling=sampling, **_take(given, _REQUEST))
        if given:
            raise ValueError(f"{next(iter(given))!r} is no option")
        _write_prompt(request, prompt, chat)
    except (TypeError, ValueError) as error:
        known = ", ".join(sorted({*_SAMPLING, *_REQUEST, *_CHAT, *_CONSTRAINTS}))
        raise ClientError(
            Code.INVALID_ARGUMENT,
            f"{error} (a request is a prompt of text, token ids or messages, with options among "
            f"{known})",
        ) from None
    return request


def build_tokenize(text: str | Sequence[Mapping[str, Any]], **options: Any) -> pb.TokenizeRequest:
    """For a text or for messages; options: model, add_special_tokens, and those of ChatMessages."""
    given = {name: value for name, value in options.items() if value is not None}
    try:
        chat = _take(given, _CHAT)
        request = pb.TokenizeRequest(**given)
        if isinstance(text, str):
            request.text = text
        else:
            request.messages.CopyFrom(_messages(text, chat))
    except (TypeError, ValueError) as error:
        raise ClientError(Code.INVALID_ARGUMENT, f"{error}") from None
    return request


def _write_prompt(request: pb.GenerateRequest, prompt: Any, chat: dict[str, Any]) -> None:
    if isinstance(prompt, str):
        request.text = prompt
    elif len(prompt) and isinstance(prompt[0], Mapping | pb.ChatMessage):
        request.messages.CopyFrom(_messages(prompt, chat))
        return
    else:
        request.token_ids.CopyFrom(pb.TokenIds(ids=prompt))
    if chat:
        raise ValueError(f"{next(iter(chat))!r} is for prompts of messages")


def _messages(messages: Sequence[Any], options: dict[str, Any]) -> pb.ChatMessages:
    return pb.ChatMessages(messages=messages, **options)


def _sampling(given: dict[str, Any]) -> pb.SamplingParams:
    """Takes its part out of what is given."""
    if isinstance(given.get("stop"), str):
        given["stop"] = [given["stop"]]
    constraints = _take(given, set(_CONSTRAINTS))
    params = pb.SamplingParams(**_take(given, _SAMPLING))
    if len(constraints) > 1:
        raise ValueError(f"at most one of {', '.join(_CONSTRAINTS)} can be given")
    for kind, value in constraints.items():
        if kind == "choices":
            params.constraint.choices.CopyFrom(pb.Choices(texts=value))
        elif kind == "json_schema" and not isinstance(value, str):
            params.constraint.json_schema = json.dumps(value)
        else:
            setattr(params.constraint, kind, value)
    return params


def _take(given: dict[str, Any], names: set[str]) -> dict[str, Any]:
    return {name: given.pop(name) for name in list(given) if name in names}
