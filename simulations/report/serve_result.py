"""What `expertmesh simulate serve` found."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from simulations.report.results import NAN, NO_LINE, Part, Result, Series
from simulations.report.values import Line, Number, Text


class Spread(Part):
    """Seconds, over all requests that finished."""

    mean: Number = NAN
    p50: Number = NAN
    p90: Number = NAN
    p99: Number = NAN


class Cdf(Series):
    """Which time (seconds) so many per cent of the requests stayed under."""

    q: Line = NO_LINE
    ttft_s: Line = NO_LINE
    tpot_s: Line = NO_LINE


class ServeSeries(Series):
    time_s: Line = NO_LINE
    output_tokens_per_s: Line = NO_LINE
    running: Line = NO_LINE
    waiting: Line = NO_LINE
    kv_usage: Line = NO_LINE
    balancedness: Line = NO_LINE


class Event(Part):
    time_s: Number
    kind: Text
    what: Text = ""


class ParetoPoint(Part):
    concurrency: Number = NAN
    tokens_per_s_per_user: Number = NAN
    tokens_per_s_per_rank: Number = NAN
    ttft_p50_s: Number = NAN


def _only_numbers(value: Any) -> Any:
    """Bytes by kind; remarks among them are not for the picture."""
    if not isinstance(value, dict):
        return value
    return {k: v for k, v in value.items() if v is None or isinstance(v, int | float)}


class ServeResult(Result):
    kind: Literal["serve"]
    requests: dict[Text, Number] = Field(default_factory=dict)
    ttft_s: Spread = Spread()
    tpot_s: Spread = Spread()
    cdf: Cdf = Cdf()
    throughput: dict[Text, Number] = Field(default_factory=dict)
    series: ServeSeries = ServeSeries()
    events: tuple[Event, ...] = ()
    memory: Annotated[dict[Text, Number], BeforeValidator(_only_numbers)] = Field(
        default_factory=dict
    )
    pareto: tuple[ParetoPoint, ...] = ()
