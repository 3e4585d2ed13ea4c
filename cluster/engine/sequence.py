"""A request as the engine sees it: its tokens, how many of them are computed, and its KV blocks."""

from array import array
from collections.abc import Sequence as TokenIds
from typing import Any, Literal, NamedTuple

from cluster.engine.plan import block_table
from cluster.engine.sampling_params import SamplingParams

__all__ = [
    "FinishReason",
    "RoutedExperts",
    "SamplingParams",
    "Sequence",
    "TokenEvent",
    "TokenLogprob",
]

FinishReason = Literal["stop", "length", "abort", "error", "refused"]
"""refused: an error of the request's own doing; error: of anybody else's."""


class TokenLogprob(NamedTuple):
    """Natural logarithms of the model's own probabilities: before penalties, temperature and filters."""

    token_id: int
    logprob: float
    rank: int
    """1 is the likeliest token."""
    top_ids: tuple[int, ...] = ()
    """The likeliest tokens, in order; of equals the lower id first."""
    top_logprobs: tuple[float, ...] = ()


class RoutedExperts(NamedTuple):
    """Experts of consecutive tokens, in all expert layers."""

    start: int
    """Position of the first token in its sequence."""
    num_layers: int
    experts_per_token: int
    ids: bytes
    """Little-endian 16-bit integers [tokens, layers, experts_per_token]."""


class TokenEvent(NamedTuple):
    """What one step did for one request; as a list it is the entry of a step's wire message."""

    request_id: str
    token_id: int | None = None
    finish_reason: FinishReason | None = None
    """None while the request goes on. With a reason this is the request's last event."""
    stop_token_id: int | None = None
    """Equal to `token_id` when that token ended the request: it counts, but is not shown."""
    error: str | None = None
    logprob: TokenLogprob | None = None
    """Of `token_id`, if asked for."""
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    """Of prompt tokens computed in this step, if asked for; all of them have come with the first token."""
    routed_experts: tuple[RoutedExperts, ...] = ()
    """Of tokens computed in this step, if asked for."""
    cached_tokens: int | None = None
    """With the first token: how many of the prompt were found in the cache."""
    queue_ms: float | None = None
    """With the first token: from arrival at the engine until it was first scheduled."""


class Sequence:
    """Prompt and emitted tokens of one request.

    Raises ValueError when the prompt is not a non-empty list of token ids below 2^31, or another
    argument is of a wrong kind. Of what is not an argument the scheduler owns everything but `queue_ms`.
    A request that resumes elsewhere comes with prompt + emitted tokens as its prompt and continues with
    the same tokens, because sampling goes by absolute position.

    priority: lower comes first. cache_salt: requests with different ones share no KV blocks.
    """

    __slots__ = (
        "block_names",
        "block_table",
        "cache_generation",
        "cache_salt",
        "finish_reason",
        "max_num_tokens",
        "next_full",
        "num_cached_tokens",
        "num_computed",
        "num_prompt_logprobs",
        "num_prompt_tokens",
        "num_routed",
        "num_slots",
        "params",
        "priority",
        "queue_ms",
        "request_id",
        "sampler_state",
        "seq_id",
        "stop_token_ids",
        "token_ids",
        "urgency",
        "wants_routed_experts",
    )

    def __init__(
        self,
        request_id: str,
        prompt_token_ids: TokenIds[int],
        params: SamplingParams,
        *,
        priority: int = 0,
        cache_salt: str = "",
        wants_routed_experts: bool = False,
    ) -> None:
        _check_token_ids(prompt_token_ids)
        if type(priority) is not int or not -(2**31) <= priority < 2**31:
            raise ValueError(f"priority must be an integer of 32 bits, got {priority!r:.40}")
        if not isinstance(cache_salt, str):
            raise ValueError(f"cache_salt must be a string, got {cache_salt!r:.40}")
        self.request_id = request_id
        self.params = params
        self.priority = priority
        self.cache_salt = cache_salt
        self.wants_routed_experts = wants_routed_experts
        self.stop_token_ids = frozenset(params.stop_token_ids)
        """Tokens that end the request; the scheduler adds the model's end-of-sequence tokens."""
        self.max_num_tokens = 0
        """Prompt and emitted tokens at which the request ends in any case; set on arrival."""
        self.token_ids: list[int] = list(prompt_token_ids)
        self.num_prompt_tokens = len(self.token_ids)
        self.num_computed = 0
        """Leading tokens whose keys and values are in the cache once the plans made so far have run."""
        self.block_table: array[int] = block_table()
        self.block_names: list[bytes] = []
        """Of its first full blocks; see `block_hash.py`."""
        self.num_slots = 0
        """Tokens that these blocks hold."""
        self.next_full = 0
        """Computed tokens at which the first block is full that has not been given its name."""
        self.cache_generation = 0
        """Of the cache's names when it began to run; with others its blocks are not named."""
        self.num_cached_tokens: int | None = None
        """Of the prompt, found in the cache when it first ran; None before that."""
        self.queue_ms: float | None = None
        """From arrival until it first ran; by the engine, for the scheduler has no clock."""
        self.num_prompt_logprobs = 0
        """How many were told already: they are not told again when it is computed again."""
        self.num_routed = 0
        """Leading tokens whose experts were told."""
        self.sampler_state: Any = None
        """What the sampler remembers of the tokens; it can be made again from them."""
        self.finish_reason: FinishReason | None = None
        self.seq_id = -1
        """Order of arrival at the scheduler; -1 before."""
        self.urgency = (priority, -1)
        """(priority, seq_id): lower comes first."""

    @property
    def num_tokens(self) -> int:
        """Prompt and emitted tokens; also the absolute position of the next token."""
        return len(self.token_ids)

    @property
    def num_emitted(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def lacks_prompt_logprobs(self) -> bool:
        """Whether log-probabilities of its prompt have yet to be told."""
        wanted = self.params.prompt_logprobs is not None
        return wanted and self.num_prompt_logprobs < self.num_prompt_tokens - 1

    @property
    def reads_cache(self) -> bool:
        """Whether it may begin with blocks that others computed: not when it asks about every token."""
        return self.params.prompt_logprobs is None and not self.wants_routed_experts

    def __repr__(self) -> str:
        return (
            f"Sequence({self.request_id!r}, {self.num_prompt_tokens} prompt + {self.num_emitted} "
            f"emitted tokens, {self.num_computed} computed, {len(self.block_table)} blocks)"
        )


def _check_token_ids(token_ids: TokenIds[int]) -> None:
    if len(token_ids) == 0:
        raise ValueError("the prompt is empty: at least one token is needed")
    try:
        array("i", token_ids)  # the fastest check that all are integers below 2^31
        lowest = min(token_ids)
    except (TypeError, OverflowError) as error:
        raise ValueError(f"prompt token ids must be integers from 0 to 2^31 - 1: {error}") from None
    if lowest < 0:
        raise ValueError(f"prompt token ids must be at least 0, got {lowest}")
