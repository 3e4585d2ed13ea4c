"""When requests come and how long they are: seeded, the same list for the same arguments."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

BURSTINESS = 0.25
"""Shape of the gamma distribution of the gaps of `bursts`: their standard deviation is twice their
mean. Shape 1 would be Poisson; vLLM's serving benchmark calls the same number `burstiness`."""
_LENGTHS, _GAPS = 1, 2  # streams of random numbers


class Arrival(NamedTuple):
    """One request: seconds since the start, tokens of its prompt, tokens that it asks for."""

    time_s: float
    prompt_tokens: int
    output_tokens: int


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Lognormal lengths in tokens: their mean, and the standard deviation of their logarithm."""

    mean: float
    spread: float = 0.0

    def __post_init__(self) -> None:
        if not 1 <= self.mean <= 1e7:
            raise ValueError(
                f"a mean length must be from 1 to 10,000,000 tokens, got {self.mean:g}"
            )
        if not 0 <= self.spread <= 3:
            raise ValueError(f"a spread of lengths must be from 0 to 3, got {self.spread:g}")

    @staticmethod
    def parse(text: str) -> Lengths:
        """`MEAN` or `MEAN:SPREAD`; ValueError otherwise."""
        mean, _, spread = text.partition(":")
        try:
            return Lengths(mean=float(mean), spread=float(spread or 0))
        except ValueError as error:
            if "could not convert" in str(error):
                raise ValueError(
                    f"{text!r} is not MEAN or MEAN:SPREAD, e.g. 1000 or 1000:0.5"
                ) from None
            raise

    def draw(self, rng: np.random.Generator, num: int) -> NDArray[np.int64]:
        """[num], each at least 1; the mean of the lognormal is exp(mu + spread^2 / 2)."""
        mu = math.log(self.mean) - self.spread**2 / 2
        lengths = np.rint(np.exp(mu + self.spread * rng.standard_normal(num)))
        return np.maximum(lengths, 1).astype(np.int64)


def open_arrivals(
    *, rate: float, num_requests: int, prompt: Lengths, output: Lengths, seed: int,
    burstiness: float = 1.0,
) -> list[Arrival]:  # fmt: skip
    """Requests that come whether or not others are answered, `rate` per second in the mean.

    Gaps are gamma distributed with shape `burstiness`: 1 is a Poisson process, less comes in bursts.
    Raises ValueError for a rate or shape that is not positive.
    """
    if not (rate > 0 and math.isfinite(rate)):
        raise ValueError(f"the rate must be a positive number of requests per second, got {rate:g}")
    if not (burstiness > 0 and math.isfinite(burstiness)):
        raise ValueError(f"burstiness must be positive, got {burstiness:g}")
    rng = np.random.default_rng([seed, _GAPS])
    times = np.cumsum(rng.gamma(burstiness, 1 / (rate * burstiness), num_requests))
    return _arrivals(times, prompt, output, seed)


def closed_arrivals(
    *, num_requests: int, prompt: Lengths, output: Lengths, seed: int
) -> list[Arrival]:
    """Requests of users who send the next one when they have their answer: times are all 0."""
    return _arrivals(np.zeros(num_requests), prompt, output, seed)


def _arrivals(
    times: NDArray[np.float64], prompt: Lengths, output: Lengths, seed: int
) -> list[Arrival]:
    if not len(times):
        raise ValueError("at least one request is needed")
    rng = np.random.default_rng([seed, _LENGTHS])
    prompts, outputs = prompt.draw(rng, len(times)), output.draw(rng, len(times))
    columns = zip(times.tolist(), prompts.tolist(), outputs.tolist(), strict=True)
    return [Arrival(*row) for row in columns]
