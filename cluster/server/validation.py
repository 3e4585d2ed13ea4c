"""Refuses every request that an engine should never see, naming field, value and allowed range."""

from collections.abc import Sequence
from dataclasses import replace

from cluster.config import ServerConfig
from cluster.engine.sampling_params import SamplingParams
from cluster.server.errors import Code, RequestError, invalid
from cluster.server.request import Chat, GenerationRequest, ModelInfo

MAX_REQUEST_ID_CHARS = 256


def check_request(
    request: GenerationRequest, model: ModelInfo, limits: ServerConfig, num_replicas: int
) -> SamplingParams:
    """Everything that can be judged without tokenizing the prompt.

    Returns the sampling parameters, `max_tokens` not yet fitted to the prompt. Raises RequestError.
    """
    check_model(request.model, model)
    request_id = request.request_id
    if request_id is not None and not 1 <= len(request_id) <= MAX_REQUEST_ID_CHARS:
        raise invalid("request_id", request_id, f"1 to {MAX_REQUEST_ID_CHARS} characters long")
    if request.replica is not None and not 0 <= request.replica < num_replicas:
        raise invalid("data_parallel_rank", request.replica, f"in [0, {num_replicas - 1}]")
    if isinstance(request.prompt, Chat):
        raise RequestError(Code.UNIMPLEMENTED, "chat messages are not implemented yet")
    _check_prompt(request.prompt, model)
    try:
        params = SamplingParams.from_dict(request.sampling)
        params.check_caps(
            max_stop_strings=limits.max_stop_strings,
            max_stop_chars=limits.max_stop_chars,
            max_stop_token_ids=limits.max_stop_token_ids,
        )
        params.check_vocabulary(model.vocab_size)
    except ValueError as error:
        raise RequestError(Code.INVALID_ARGUMENT, str(error)) from None
    return params


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


def fit_max_tokens(
    params: SamplingParams, request: GenerationRequest, num_prompt_tokens: int, model: ModelInfo,
    default: int,
) -> SamplingParams:  # fmt: skip
    """Clip max_tokens so that prompt and completion fit the model; `default` where none was set."""
    wanted = params.max_tokens if "max_tokens" in request.sampling else default
    return replace(params, max_tokens=min(wanted, model.max_model_len - num_prompt_tokens))


def _check_prompt(prompt: str | Sequence[int] | None, model: ModelInfo) -> None:
    if prompt is None:
        raise RequestError(
            Code.INVALID_ARGUMENT, "the request has no prompt: must have text or token_ids"
        )
    if isinstance(prompt, str):
        if not prompt:
            raise invalid("text", prompt, "at least one character long")
        return
    check_prompt_length(len(prompt), model)
    for idx, token_id in enumerate(prompt):
        if not 0 <= token_id < model.vocab_size:
            raise invalid(f"token_ids[{idx}]", token_id, f"in [0, {model.vocab_size - 1}]")
