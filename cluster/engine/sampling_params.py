"""How one request wants its tokens chosen, checked once and completely.

Every rejection names the field, the value and the allowed range, so that the front end can hand
the message to the user as it is. Free of torch: the gRPC front end imports it too.
"""

from collections.abc import Collection, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Any, Final, Self

from cluster.engine import checks
from cluster.engine.constraint import Constraint

__all__ = ["Constraint", "SamplingParams"]

MAX_TEMPERATURE: Final = 100.0
MAX_PENALTY: Final = 2.0
"""Of frequency and presence, either way."""
MAX_REPETITION_PENALTY: Final = 100.0
MAX_BIAS: Final = 100.0
MAX_SEED: Final = 2**64 - 1
MAX_COUNT: Final = 2**31 - 1
"""Upper end of numbers of tokens, of `top_k`, and of each token id."""
MAX_STOP_STRINGS: Final = 256
MAX_STOP_CHARS: Final = 65_536
"""Longest stop string, in characters."""
MAX_IDS: Final = 65_536
"""Entries of stop_token_ids, logit_bias and bad_words, and ids of a bad word."""
MAX_ALLOWED_IDS: Final = 1 << 20
MAX_LOGPROBS: Final = 65_536


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Sampling parameters of one request; raises ValueError (never TypeError) when one is wrong.

    The chosen token depends on the logits, on these values, on the tokens before it and on its
    position alone: see `sampler.py` for the order of the filters and for the random numbers, and
    `logit_rules.py` for what goes before them.
    """

    temperature: float = 1.0
    """0 is greedy; so is anything below 1e-5."""
    top_p: float = 1.0
    """Keep the fewest most probable tokens whose probabilities reach top_p. 1: all."""
    top_k: int = 0
    """Keep the top_k most probable tokens (and ties of the last). 0: all."""
    min_p: float = 0.0
    """Keep tokens at least min_p times as probable as the most probable one."""
    seed: int = 0
    """Key of the random numbers. The front end draws one for requests that bring none."""
    max_tokens: int = 16
    stop: tuple[str, ...] = ()
    """Texts that end the completion; part of it only with `include_stop_string`."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end the completion, besides the model's end-of-sequence tokens."""
    ignore_eos: bool = False
    """Go on after end-of-sequence tokens (`stop_token_ids` still stop)."""
    min_tokens: int = 0
    """No stop token before so many tokens; `max_tokens` ends the completion in any case."""
    frequency_penalty: float = 0.0
    """Subtracted from a token's logit for each time that the completion has it."""
    presence_penalty: float = 0.0
    """Subtracted once from the logit of each token that the completion has."""
    repetition_penalty: float = 1.0
    """Divides positive logits of tokens of prompt and completion, multiplies negative ones."""
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    """Added to the logits of these tokens. Also taken as a list of pairs."""
    allowed_token_ids: tuple[int, ...] = ()
    """No other token is chosen. Empty: any."""
    bad_words: tuple[tuple[int, ...], ...] = ()
    """Sequences of tokens that the completion does not contain."""
    logprobs: int | None = None
    """Report each token's log probability, and so many of the likeliest. None: report nothing."""
    prompt_logprobs: int | None = None
    """The same for each token of the prompt but the first."""
    constraint: Constraint | None = None
    """What the completion follows (extra: guided)."""
    include_stop_string: bool = False
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        set_field = object.__setattr__
        number, integer = checks.number, checks.integer
        set_field(self, "temperature", number("temperature", self.temperature, MAX_TEMPERATURE))
        set_field(self, "min_p", number("min_p", self.min_p, 1.0))
        set_field(self, "top_p", number("top_p", self.top_p, 1.0, low_excluded=True))
        integer("top_k", self.top_k, 0, MAX_COUNT, note="; 0 keeps all tokens")
        integer("seed", self.seed, 0, MAX_SEED)
        integer("max_tokens", self.max_tokens, 1, MAX_COUNT)
        integer("min_tokens", self.min_tokens, 0, MAX_COUNT)
        for name in ("ignore_eos", "include_stop_string", "skip_special_tokens"):
            checks.boolean(name, getattr(self, name))
        set_field(self, "stop", checks.items("stop", self.stop, MAX_STOP_STRINGS))
        for idx, text in enumerate(self.stop):
            checks.text(f"stop[{idx}]", text, MAX_STOP_CHARS)
        for name, most in (("stop_token_ids", MAX_IDS), ("allowed_token_ids", MAX_ALLOWED_IDS)):
            set_field(self, name, checks.token_ids(name, getattr(self, name), most, MAX_COUNT))
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                integer(name, getattr(self, name), 0, MAX_LOGPROBS)
        self._check_penalties()
        if self.constraint is not None:
            set_field(self, "constraint", Constraint.of(self.constraint))
            if self.ignore_eos:
                raise ValueError(
                    "ignore_eos must be false with a constraint: a completion that has met it ends"
                )

    def _check_penalties(self) -> None:
        set_field = object.__setattr__
        for name in ("frequency_penalty", "presence_penalty"):
            value = checks.number(name, getattr(self, name), MAX_PENALTY, low=-MAX_PENALTY)
            set_field(self, name, value)
        value = checks.number(
            "repetition_penalty", self.repetition_penalty, MAX_REPETITION_PENALTY, low_excluded=True
        )
        set_field(self, "repetition_penalty", value)
        set_field(self, "logit_bias", _biases(self.logit_bias))
        words = checks.items("bad_words", self.bad_words, MAX_IDS)
        for idx, word in enumerate(words):
            if not checks.token_ids(f"bad_words[{idx}]", word, MAX_IDS, MAX_COUNT):
                raise ValueError(f"bad_words[{idx}] must have a token at least, got none")
        set_field(self, "bad_words", tuple(map(tuple, words)))

    @property
    def is_greedy(self) -> bool:
        return self.temperature < 1e-5

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise ValueError when a token id is outside the model's vocabulary."""
        named: list[tuple[str, Collection[int]]] = [
            ("stop_token_ids", self.stop_token_ids),
            ("logit_bias", self.logit_bias),
            ("allowed_token_ids", self.allowed_token_ids),
            *((f"bad_words[{idx}]", word) for idx, word in enumerate(self.bad_words)),
        ]
        for name, ids in named:
            if ids and max(ids) >= vocab_size:
                checks.token_ids(name, tuple(ids), len(ids), vocab_size - 1)

    def check_caps(
        self,
        *,
        max_stop_strings: int,
        max_stop_chars: int,
        max_stop_token_ids: int,
        max_logprobs: int = MAX_LOGPROBS,
    ) -> None:
        """Raise ValueError when a server's own, tighter caps are exceeded."""
        checks.items("stop", self.stop, max_stop_strings)
        checks.items("stop_token_ids", self.stop_token_ids, max_stop_token_ids)
        for idx, text in enumerate(self.stop):
            checks.text(f"stop[{idx}]", text, max_stop_chars)
        for name in ("logprobs", "prompt_logprobs"):
            checks.integer(name, getattr(self, name) or 0, 0, max_logprobs)

    def to_dict(self) -> dict[str, Any]:
        """Plain values that msgpack can carry; `from_dict` gives an equal object.

        What few requests set (from `min_tokens` on) is there only where it is set.
        """
        values = {name: getattr(self, name) for name in _FIELDS}
        values = {
            name: value
            for name, value in values.items()
            if name not in _RARE or value != _RARE[name]
        }
        if self.logit_bias:
            values["logit_bias"] = [list(pair) for pair in self.logit_bias.items()]
        if self.constraint is not None:
            values["constraint"] = asdict(self.constraint)
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Raise ValueError for unknown names as well as for wrong values."""
        if unknown := [name for name in values if name not in _FIELDS]:
            raise ValueError(
                f"unknown sampling parameter {unknown[0]!r:.100}; known: {', '.join(_FIELDS)}"
            )
        return cls(**values)


def _biases(value: Any) -> dict[int, float]:
    pairs = value.items() if isinstance(value, Mapping) else value
    if isinstance(pairs, str | bytes) or not isinstance(pairs, Collection):
        raise ValueError(f"logit_bias must be a map of token ids, got {value!r:.100}")
    if len(pairs) > MAX_IDS:
        raise ValueError(f"logit_bias must have at most {MAX_IDS} entries, got {len(pairs)}")
    biases = {}
    for pair in pairs:
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise ValueError(f"logit_bias must have pairs of id and bias, got {pair!r:.100}")
        token_id, bias = pair
        checks.integer("logit_bias: a token id", token_id, 0, MAX_COUNT)
        biases[token_id] = checks.number(f"logit_bias[{token_id}]", bias, MAX_BIAS, low=-MAX_BIAS)
    return biases


_FIELDS = {item.name: item for item in fields(SamplingParams)}
_RARE = {
    name: {} if item.default is MISSING else item.default
    for name, item in list(_FIELDS.items())[list(_FIELDS).index("min_tokens") :]
}
