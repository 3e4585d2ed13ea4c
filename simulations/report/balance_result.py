"""What `expertmesh simulate balance` found.

L MoE layers, E experts, R ranks, N nodes.
"""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from simulations.report.results import NAN, NO_GRID, NO_LINE, Part, Result, Series
from simulations.report.values import FloatArray, Grid, Line, Number, Text, Whole


class BeforeAfter(Part):
    """[L, R] or [L, E] (X either): load over the mean of its layer, in the first and last tenth of the run."""

    before: Grid = NO_GRID
    after: Grid = NO_GRID

    def known(self) -> dict[str, FloatArray]:
        """Those of the two that are there."""
        both = {"before": self.before, "after": self.after}
        return {when: map_LX for when, map_LX in both.items() if map_LX.size}


def _once_or_twice(value: Any) -> Any:
    """One map for the whole run stands for both of its ends."""
    return {"before": value} if isinstance(value, list) else value


class Straggler(Part):
    """The rank that was slowest most often, and in which share of the steps."""

    rank: Whole = None
    share: Number = NAN


class Rebalance(Part):
    step: Number
    layers: Number = NAN
    moves: Number = NAN
    bytes: Number = NAN
    pause_s: Number = NAN


class PolicySeries(Series):
    """By step: served and planned mean / max over ranks, tokens per second."""

    step: Line = NO_LINE
    balancedness: Line = NO_LINE
    planned_balancedness: Line = NO_LINE
    throughput: Line = NO_LINE


class Policy(Part):
    imbalance_mean: Number = NAN
    imbalance_p99: Number = NAN
    planned_imbalance: Number = NAN
    difference_mean: Number = NAN
    node_bytes_per_token: Number = NAN
    node_rows_per_token: Number = NAN
    rank_bytes_per_token: Number = NAN
    migrated_bytes: Number = NAN
    moves: Number = NAN
    throughput: Number = NAN
    throughput_bare: Number = NAN
    step_ms_mean: Number = NAN
    step_ms_p99: Number = NAN
    straggler: Straggler = Straggler()
    rebalances: tuple[Rebalance, ...] = ()
    series: PolicySeries = PolicySeries()
    rank_load_LR: BeforeAfter = BeforeAfter()
    node_traffic_NN: Grid = NO_GRID
    layer_ms: dict[Text, Number] = Field(default_factory=dict)


class BalanceResult(Result):
    kind: Literal["balance"]
    expert_load_LE: Annotated[BeforeAfter, BeforeValidator(_once_or_twice)] = BeforeAfter()
    policies: dict[Text, Policy] = Field(default_factory=dict)
