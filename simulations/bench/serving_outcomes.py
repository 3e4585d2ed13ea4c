"""What became of each request of a load, and the figures that serving is judged by.

TTFT  from sending a request to its first token
ITL   between two chunks of an answer that follow each other
TPOT  mean time of a token after the first: (last - first) / (tokens - 1)
E2E   from sending a request to its end
goodput   requests, and their tokens, that met the service level objective (SLO)
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

REJECTED = "RESOURCE_EXHAUSTED"
PERCENTILES = (50, 95, 99)


@dataclass(slots=True)
class Outcome:
    """Times are seconds; `chunk_s` and `end_s` since the request was sent."""

    idx: int
    sent_s: float
    """Since the load began."""
    late_s: float = 0.0
    """How much later than planned it was sent: what an open loop's generator could not keep up with."""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    planned_tokens: int = 0
    num_tokens: int = 0
    chunk_s: array[float] = field(default_factory=lambda: array("d"))
    end_s: float = 0.0
    num_ends: int = 0
    """Finish messages and errors that came: one, if all is well."""
    code: str = ""
    """Of the error that ended it; empty for a complete answer."""
    message: str = ""
    token_ids: list[int] | None = None

    @property
    def ok(self) -> bool:
        return not self.code

    @property
    def rejected(self) -> bool:
        return self.code == REJECTED and self.num_tokens == 0

    @property
    def ttft_s(self) -> float:
        return self.chunk_s[0] if self.chunk_s else self.end_s

    @property
    def tpot_s(self) -> float:
        if self.num_tokens < 2 or not self.chunk_s:
            return 0.0
        return (self.chunk_s[-1] - self.chunk_s[0]) / (self.num_tokens - 1)


@dataclass(frozen=True)
class Slo:
    """Service level objective of one request; None: no limit."""

    ttft_ms: float | None = None
    tpot_ms: float | None = None

    def met(self, outcome: Outcome) -> bool:
        return (
            outcome.ok
            and (self.ttft_ms is None or 1e3 * outcome.ttft_s <= self.ttft_ms)
            and (self.tpot_ms is None or 1e3 * outcome.tpot_s <= self.tpot_ms)
        )


def summary(outcomes: Sequence[Outcome], seconds: float, slo: Slo) -> dict[str, Any]:
    """Figures of one load that took `seconds`; rates are per second of these."""
    done = [outcome for outcome in outcomes if outcome.ok]
    rejected = [outcome for outcome in outcomes if outcome.rejected]
    good = [outcome for outcome in done if slo.met(outcome)]
    seconds = max(seconds, 1e-9)
    tokens = sum(outcome.num_tokens for outcome in done)
    gaps = [gap for outcome in done for gap in np.diff(outcome.chunk_s).tolist()]
    return {
        "seconds": seconds,
        "throughput_tokens_per_s": tokens / seconds,
        "requests_per_s": len(done) / seconds,
        "completion_tokens": tokens,
        "prompt_tokens": sum(outcome.prompt_tokens for outcome in done),
        "cached_tokens": sum(outcome.cached_tokens for outcome in done),
        "prefix_hit_rate": sum(o.cached_tokens for o in done)
        / max(1, sum(o.prompt_tokens for o in done)),
        "requests": {
            "ok": len(done),
            "rejected": len(rejected),
            "failed": len(outcomes) - len(done) - len(rejected),
        },
        "errors": dict(Counter(o.code for o in outcomes if not o.ok)),
        "error_examples": {o.code: o.message for o in reversed(outcomes) if not o.ok},
        "ttft_ms": percentiles_ms(outcome.ttft_s for outcome in done),
        "tpot_ms": percentiles_ms(outcome.tpot_s for outcome in done if outcome.num_tokens > 1),
        "itl_ms": percentiles_ms(gaps),
        "e2e_ms": percentiles_ms(outcome.end_s for outcome in done),
        "rejection_ms": percentiles_ms(outcome.end_s for outcome in rejected),
        "sent_late_ms": percentiles_ms(outcome.late_s for outcome in outcomes),
        "goodput": {
            "requests_per_s": len(good) / seconds,
            "tokens_per_s": sum(outcome.num_tokens for outcome in good) / seconds,
            "share": len(good) / max(1, len(outcomes)),
        },
    }


def percentiles_ms(seconds: Iterable[float]) -> dict[str, float | None]:
    """Mean, p50, p95, p99 and maximum in milliseconds; None of nothing."""
    values = 1e3 * np.fromiter(seconds, np.float64)
    if not len(values):
        return dict.fromkeys(("mean", *(f"p{p}" for p in PERCENTILES), "max"))
    return {
        "mean": float(values.mean()),
        **{f"p{p}": float(np.percentile(values, p)) for p in PERCENTILES},
        "max": float(values.max()),
    }
