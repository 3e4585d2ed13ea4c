"""What a load generator sends: prompts, lengths and times, the same for the same arguments.

Prompts are random token ids, so that their lengths are exact and nothing is cached by chance; what is
to be shared is said. Answers run to their planned length, whatever the model says.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from simulations.serving.arrivals import Lengths, closed_arrivals, open_arrivals

_SPECIAL_IDS = 16  # checkpoints keep their special tokens below this, or at the vocabulary's end
_PREFIXES, _CHOICES, _IDS = 101, 102, 103  # streams of random numbers


class Planned(NamedTuple):
    """One request: when it is due in seconds since the start, and what it asks for."""

    at_s: float
    token_ids: tuple[int, ...]
    max_tokens: int
    seed: int


@dataclass(frozen=True, kw_only=True)
class Load:
    """`concurrency` users of a closed loop, or `rate` requests a second of an open one.

    Each prompt is one of `num_prefixes` shared beginnings of `prefix_tokens`, if any, and then as many
    tokens of its own as `prompt` says.
    """

    num_requests: int
    prompt: Lengths
    output: Lengths
    concurrency: int | None = None
    rate: float | None = None
    burstiness: float = 1.0
    """Of an open loop: 1 is Poisson, less comes in bursts."""
    num_prefixes: int = 0
    prefix_tokens: int = 0
    temperature: float = 0.0
    seed: int = 0
    keep_tokens: int = 0
    """Token ids of so many first answers are kept, to be compared."""

    def __post_init__(self) -> None:
        if (self.concurrency is None) == (self.rate is None):
            raise ValueError("a load has either a concurrency (closed loop) or a rate (open loop)")
        if self.concurrency is not None and self.concurrency < 1:
            raise ValueError(f"the concurrency must be at least 1, got {self.concurrency}")
        if (self.num_prefixes > 0) != (self.prefix_tokens > 0):
            raise ValueError(
                "shared prefixes need a number and a length: "
                f"{self.num_prefixes} prefixes of {self.prefix_tokens} tokens"
            )

    @property
    def longest(self) -> int:
        """Tokens of prompt and answer that nearly all requests stay below."""
        longest = (length.mean * np.exp(3 * length.spread) for length in (self.prompt, self.output))
        return self.prefix_tokens + int(np.ceil(sum(longest)))

    def plan(self, vocab_size: int, max_model_len: int) -> list[Planned]:
        """All requests, in order of time. Raises ValueError if none would fit the model."""
        if self.prefix_tokens + 2 > max_model_len:
            raise ValueError(
                f"shared prefixes of {self.prefix_tokens} tokens leave no room: max_model_len = "
                f"{max_model_len}"
            )
        lengths = {"prompt": self.prompt, "output": self.output, "seed": self.seed}
        if self.rate is None:
            arrivals = closed_arrivals(num_requests=self.num_requests, **lengths)  # type: ignore[arg-type]
        else:
            arrivals = open_arrivals(
                rate=self.rate,
                num_requests=self.num_requests,
                burstiness=self.burstiness,
                **lengths,  # type: ignore[arg-type]
            )
        prefixes = self._prefixes(vocab_size)
        own = np.random.default_rng([self.seed, _IDS])
        planned = []
        for idx, arrival in enumerate(arrivals):
            prefix = prefixes[idx] if prefixes else ()
            room = max_model_len - len(prefix) - 1
            num_own = min(arrival.prompt_tokens, room)
            ids = own.integers(min(_SPECIAL_IDS, vocab_size - 1), vocab_size, num_own).tolist()
            most = min(arrival.output_tokens, max_model_len - len(prefix) - num_own)
            planned.append(Planned(arrival.time_s, (*prefix, *ids), most, self.seed + idx))
        return planned

    def _prefixes(self, vocab_size: int) -> list[tuple[int, ...]]:
        """Of each request, drawn evenly from those there are."""
        if self.num_prefixes == 0:
            return []
        low = min(_SPECIAL_IDS, vocab_size - 1)
        rng = np.random.default_rng([self.seed, _PREFIXES])
        drawn = rng.integers(low, vocab_size, (self.num_prefixes, self.prefix_tokens))
        shared = [tuple(row) for row in drawn.tolist()]
        chosen = np.random.default_rng([self.seed, _CHOICES]).integers(
            self.num_prefixes, size=self.num_requests
        )
        return [shared[idx] for idx in chosen.tolist()]
