"""Refuses every request that an engine should never see, naming field, value and allowed range."""

from array import array
from collections.abc import Mapping, Sequence
from typing import Any

from cluster.config import ServerConfig
from cluster.engine import checks
from cluster.engine.sampling_params import SamplingParams
from cluster.server.errors import Code, RequestError, invalid
from cluster.server.request import Chat, GenerationRequest, ModelInfo

MAX_REQUEST_ID_CHARS = 256
MAX_CACHE_SALT_CHARS = 256
_INT32 = range(-(2**31), 2**31)


def check_request(
    request: GenerationRequest, model: ModelInfo, limits: ServerConfig, num_replicas: int
) -> None:
    """Everything but the sampling parameters that can be judged without tokenizing the prompt.

    Raises RequestError.
    """
    check_model(request.model, model)
    if request.deadline_s is not None and request.deadline_s <= 0:
        raise RequestError(Code.DEADLINE_EXCEEDED, "the deadline had passed on arrival")
    if request.request_id is not None:
        _check_text("request_id", request.request_id, MAX_REQUEST_ID_CHARS)
    if request.cache_salt:
        _check_text("cache_salt", request.cache_salt, MAX_CACHE_SALT_CHARS)
    if request.replica is not None and request.replica not in range(num_replicas):
        raise invalid("data_parallel_rank", request.replica, f"in [0, {num_replicas - 1}]")
    if request.priority not in _INT32:
        raise invalid("priority", request.priority, "in [-2147483648, 2147483647]")
    if request.n not in range(1, limits.max_choices + 1):
        raise invalid("n", request.n, f"in [1, server.max_choices = {limits.max_choices}]")
    _check_prompt(request.prompt, model)


def read_sampling(
    values: Mapping[str, Any], model: ModelInfo, limits: ServerConfig
) -> tuple[SamplingParams, tuple[str, ...]]:
    """Sampling parameters, and the bad words that are to be tokenized for them.

    `max_tokens` is not yet fitted to the prompt. Raises RequestError.
    """
    values = dict(values)
    words = values.pop("bad_words", ())
    try:
        words = checks.items("bad_words", words, limits.max_bad_words)
        for idx, word in enumerate(words):
            checks.text(f"bad_words[{idx}]", word, limits.max_stop_chars)
            if word.isspace():
                raise ValueError(f"bad_words[{idx}] must be more than white space, got {word!r}")
        params = SamplingParams.from_dict(values)
        params.check_caps(
            max_stop_strings=limits.max_stop_strings,
            max_stop_chars=limits.max_stop_chars,
            max_stop_token_ids=limits.max_stop_token_ids,
            max_logprobs=limits.max_logprobs,
        )
        params.check_vocabulary(model.vocab_size)
    except ValueError as error:
        raise RequestError(Code.INVALID_ARGUMENT, str(error)) from None
    return params, words


def check_model(name: str | None, model: ModelInfo) -> None:
    if name is not None and name != model.name:
        raise RequestError(
            Code.NOT_FOUND,
            f"model {name!r:.200} is not served here; this server has {model.name!r}",
        )


def check_prompt_length(num_tokens: int, model: ModelInfo) -> None:
    """A prompt must leave room for one token of completion."""
    if num_tokens == 0:
        raise RequestError(Code.INVALID_ARGUMENT, "the prompt is empty: must have a token at least")
    if num_tokens >= model.max_model_len:
        raise RequestError(
            Code.INVALID_ARGUMENT,
            f"the prompt has {num_tokens} tokens; must have at most max_model_len - 1 = "
            f"{model.max_model_len - 1}",
        )


def check_prompt_text(name: str, text: str) -> None:
    if not text:
        raise invalid(name, text, "at least one character long")
    _check_text(name, text, len(text))


def _check_prompt(prompt: str | Sequence[int] | Chat | None, model: ModelInfo) -> None:
    match prompt:
        case None:
            raise RequestError(
                Code.INVALID_ARGUMENT,
                "the request has no prompt: must have text, token_ids or messages",
            )
        case Chat():
            if not prompt.messages:
                raise invalid("messages", [], "one message at least")
        case str():
            check_prompt_text("text", prompt)
        case _:
            check_prompt_length(len(prompt), model)
            _check_vocabulary(prompt, model.vocab_size)


def _check_vocabulary(token_ids: Sequence[int], vocab_size: int) -> None:
    try:
        # The fastest check that all are integers; most prompts need no other one.
        if min(array("q", token_ids)) >= 0 and max(token_ids) < vocab_size:
            return
    except (TypeError, OverflowError):
        pass
    for idx, token_id in enumerate(token_ids):
        if type(token_id) is not int or not 0 <= token_id < vocab_size:
            raise invalid(f"token_ids[{idx}]", token_id, f"in [0, {vocab_size - 1}]")


def _check_text(name: str, text: str, max_chars: int) -> None:
    try:
        checks.text(name, text, max_chars)
    except ValueError as error:
        raise RequestError(Code.INVALID_ARGUMENT, str(error)) from None
