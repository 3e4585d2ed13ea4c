"""What every front end (gRPC, later HTTP) gives to the gateway and gets back from it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from cluster.engine.sequence import RoutedExperts, TokenLogprob


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """What the gateway must know of the model to refuse bad requests before any engine sees them."""

    name: str
    vocab_size: int
    max_model_len: int
    """Longest prompt plus completion, in tokens."""
    eos_token_ids: tuple[int, ...] = ()
    architecture: str = ""
    dtype: str = ""

    def __post_init__(self) -> None:
        if self.vocab_size < 1 or self.max_model_len < 2:
            raise ValueError(
                "a model needs vocab_size >= 1 and max_model_len >= 2: "
                f"{self.vocab_size=}, {self.max_model_len=}"
            )


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """One request as the client made it, not yet checked; None means the default."""

    prompt: "str | Sequence[int] | Chat | None"
    request_id: str | None = None
    model: str | None = None
    replica: int | None = None
    deadline_s: float | None = None
    """Seconds from now after which the client does not want the answer any more."""
    sampling: Mapping[str, Any] = field(default_factory=dict)
    """Fields of SamplingParams that the client set; the others take their defaults. `bad_words` are texts
    here, and token ids once the gateway has tokenized them."""
    n: int = 1
    """Completions; choice i draws its tokens with seed + i."""
    priority: int = 0
    """Lower goes first."""
    cache_salt: str = ""
    return_routed_experts: bool = False
    traceparent: str | None = None
    """W3C trace context that the client sent."""


@dataclass(frozen=True, kw_only=True)
class ChatMessage:
    role: str
    content: str
    name: str | None = None


@dataclass(frozen=True, kw_only=True)
class Chat:
    """A prompt that a template makes of messages; `preset` names a task of the configuration."""

    messages: tuple[ChatMessage, ...]
    preset: str | None = None
    add_generation_prompt: bool = True
    """End with what the assistant's message begins with."""
    template_options: Mapping[str, Any] = field(default_factory=dict)
    """Further values for the template, such as `enable_thinking`."""


class FinishReason(StrEnum):
    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"


@dataclass(frozen=True, kw_only=True)
class Finish:
    """Why a completion ended; at most one of the last three is set, and only for STOP."""

    reason: FinishReason
    stop_token_id: int | None = None
    eos_token_id: int | None = None
    stop_string: str | None = None


@dataclass(frozen=True, kw_only=True)
class PromptInfo:
    """What the server made of the request."""

    request_id: str
    num_tokens: int
    seed: int
    replica: int
    max_tokens: int
    text: str | None = None
    """Of chat requests: what the template made of the messages."""


@dataclass(frozen=True, kw_only=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int
    ttft_ms: float
    total_ms: float
    cached_tokens: int = 0
    queue_ms: float = 0.0


@dataclass(kw_only=True, slots=True)
class Chunk:
    """A piece of a completion: the first has `prompt`, the last of each choice its `finish`, the very last
    `usage`. Not frozen, because that would make it three times as slow, and there is one for each token.
    """

    text: str = ""
    token_ids: tuple[int, ...] = ()
    prompt: PromptInfo | None = None
    finish: Finish | None = None
    usage: Usage | None = None
    index: int = 0
    """Of the choice, where a request has several."""
    logprobs: tuple[TokenLogprob, ...] = ()
    """One for each of `token_ids`, if asked for."""
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    routed_experts: tuple[RoutedExperts, ...] = ()
