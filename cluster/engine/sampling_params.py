"""How one request wants its tokens chosen, checked once and completely.

Every rejection names the field, the value and the allowed range, so that the front end can hand
the message to the user as it is. Free of torch: the gRPC front end imports it too.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Final, Self

MAX_TEMPERATURE: Final = 100.0
MAX_SEED: Final = 2**64 - 1
MAX_COUNT: Final = 2**31 - 1
"""Upper end of `max_tokens`, `top_k` and of each id in `stop_token_ids`."""
MAX_STOP_STRINGS: Final = 256
MAX_STOP_CHARS: Final = 65_536
"""Longest stop string, in characters."""
MAX_STOP_TOKEN_IDS: Final = 65_536


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Sampling parameters of one request; raises ValueError (never TypeError) when one is wrong.

    The chosen token depends on the logits, on these values and on the token's position alone:
    see `sampler.py` for the order of the filters and for the random numbers.
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
    """Texts that end the completion; not part of it."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end the completion, besides the model's end-of-sequence tokens."""
    ignore_eos: bool = False
    """Go on after end-of-sequence tokens (`stop_token_ids` still stop)."""

    def __post_init__(self) -> None:
        set_field = object.__setattr__
        set_field(self, "temperature", _number("temperature", self.temperature, MAX_TEMPERATURE))
        set_field(self, "min_p", _number("min_p", self.min_p, 1.0))
        set_field(self, "top_p", _number("top_p", self.top_p, 1.0, low_excluded=True))
        _integer("top_k", self.top_k, 0, MAX_COUNT, note="; 0 keeps all tokens")
        _integer("seed", self.seed, 0, MAX_SEED)
        _integer("max_tokens", self.max_tokens, 1, MAX_COUNT)
        if not isinstance(self.ignore_eos, bool):
            raise ValueError(f"ignore_eos must be true or false, got {self.ignore_eos!r:.100}")
        set_field(self, "stop", _items("stop", self.stop, MAX_STOP_STRINGS))
        set_field(
            self,
            "stop_token_ids",
            _items("stop_token_ids", self.stop_token_ids, MAX_STOP_TOKEN_IDS),
        )
        for idx, text in enumerate(self.stop):
            _stop_string(f"stop[{idx}]", text)
        for idx, token_id in enumerate(self.stop_token_ids):
            _integer(f"stop_token_ids[{idx}]", token_id, 0, MAX_COUNT)

    @property
    def is_greedy(self) -> bool:
        return self.temperature < 1e-5

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise ValueError when a stop token is outside the model's vocabulary."""
        for idx, token_id in enumerate(self.stop_token_ids):
            _integer(f"stop_token_ids[{idx}]", token_id, 0, vocab_size - 1)

    def check_caps(
        self, *, max_stop_strings: int, max_stop_chars: int, max_stop_token_ids: int
    ) -> None:
        """Raise ValueError when a server's own, tighter caps are exceeded."""
        _items("stop", self.stop, max_stop_strings)
        _items("stop_token_ids", self.stop_token_ids, max_stop_token_ids)
        for idx, text in enumerate(self.stop):
            _stop_string(f"stop[{idx}]", text, max_stop_chars)

    def to_dict(self) -> dict[str, Any]:
        """Plain values that msgpack can carry; `from_dict` gives an equal object."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Raise ValueError for unknown names as well as for wrong values."""
        known = [field.name for field in fields(cls)]
        if unknown := [name for name in values if name not in known]:
            raise ValueError(
                f"unknown sampling parameter {unknown[0]!r:.100}; known: {', '.join(known)}"
            )
        return cls(**values)


def _number(name: str, value: Any, high: float, low_excluded: bool = False) -> float:
    allowed = f"{'above 0' if low_excluded else 'at least 0'} and at most {high:g}"
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name} must be a number {allowed}, got {value!r:.100}")
    # Comparisons with NaN are false, so this refuses NaN as well; huge ints would overflow float().
    if not 0 <= value <= high or (low_excluded and value == 0):
        shown = value if isinstance(value, float) and not math.isfinite(value) else f"{value!r:.40}"
        raise ValueError(f"{name} must be {allowed}, got {shown}")
    return float(value)


def _integer(name: str, value: Any, low: int, high: int, note: str = "") -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(
            f"{name} must be an integer from {low} to {high}{note}, got {value!r:.100}"
        )
    if not low <= value <= high:
        raise ValueError(f"{name} must be from {low} to {high}{note}, got {value!r:.40}")


def _items(name: str, values: Any, max_items: int) -> tuple[Any, ...]:
    if isinstance(values, str | bytes | Mapping) or not isinstance(values, Collection):
        raise ValueError(f"{name} must be a list, got {values!r:.100}")
    if len(values) > max_items:
        raise ValueError(f"{name} must have at most {max_items} entries, got {len(values)}")
    return tuple(values)


def _stop_string(name: str, text: Any, max_chars: int = MAX_STOP_CHARS) -> None:
    if not isinstance(text, str):
        raise ValueError(f"{name} must be a string, got {text!r:.100}")
    if not 1 <= len(text) <= max_chars:
        raise ValueError(
            f"{name} must have from 1 to {max_chars} characters, got {len(text)}: {text!r:.60}"
        )
    if not text.isascii() and any("\ud800" <= char <= "\udfff" for char in text):
        raise ValueError(f"{name} must be valid Unicode, got lone surrogates: {text!r:.60}")
