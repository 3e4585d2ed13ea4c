"""Bodies of HTTP requests: OpenAI's fields, and vLLM's where OpenAI has none.

Types are checked here; ranges and meaning by the gateway, alike for every front end. null means the
default. Unknown fields are refused, as OpenAI refuses them: a misspelt one would have no effect.
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Json = dict[str, Any]


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(Body):
    include_usage: bool = False
    """One more event before the end, without choices, with the usage of the whole answer."""
    include_obfuscation: bool | None = None
    """Has no effect."""


class JsonSchema(Body):
    name: str
    schema_: Json = Field(default_factory=dict, alias="schema")
    description: str | None = None
    strict: bool | None = None
    """Has no effect: completions always follow their schema."""


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StructuredOutputs(Body):
    """vLLM's; exactly one of them."""

    json_: Json | str | None = Field(default=None, alias="json")
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None


class GenerationBody(Body):
    """What completions and chats have in common."""

    model: str | None = None
    """Default: the one model served."""
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = None
    max_tokens: int | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    response_format: ResponseFormat | None = None
    user: str | None = None
    """Has no effect."""

    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    prompt_logprobs: int | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Json | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    priority: int | None = None
    cache_salt: str | None = None
    return_token_ids: bool | None = None


class CompletionBody(GenerationBody):
    """Of POST /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]]
    echo: bool | None = None
    logprobs: int | None = None
    """Each token's, and those of so many of the likeliest."""
    best_of: int | None = None
    """Must equal n."""
    suffix: None = None


class TextPart(Body):
    type: Literal["text"]
    text: str


class Message(Body):
    role: str
    content: str | list[TextPart] | None = None
    name: str | None = None
    refusal: None = None
    """Of answers that are sent back as they came."""
    tool_calls: None = None
    function_call: None = None
    annotations: None = None
    audio: None = None


class ChatCompletionBody(GenerationBody):
    """Of POST /v1/chat/completions."""

    messages: list[Message]
    max_completion_tokens: int | None = None
    """The newer name of max_tokens."""
    logprobs: bool | None = None
    top_logprobs: int | None = None
    preset: str | None = None
    """A task of the server; the model's name MODEL:PRESET says the same."""
    add_generation_prompt: bool | None = None
    chat_template_kwargs: Json | None = None
    tools: None = None
    tool_choice: Literal["none"] | None = None
    parallel_tool_calls: bool | None = None
    """Has no effect: no tools are called."""
    store: Literal[False] | None = None
    metadata: Json | None = None
    """Has no effect: nothing is stored."""


class TokenizeBody(Body):
    """Of POST /tokenize: `prompt` or `messages`."""

    model: str | None = None
    prompt: str | None = None
    add_special_tokens: bool | None = None
    messages: list[Message] | None = None
    preset: str | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: Json | None = None


class DetokenizeBody(Body):
    """Of POST /detokenize."""

    model: str | None = None
    tokens: list[int]
