"""The tables of `simulate balance`: policies as rows, in one order and colour."""

import math
from collections.abc import Sequence

from simulations.report.balance_result import BalanceResult, Policy
from simulations.report.style import colour_of, label_of
from simulations.report.tables import Column, Table
from simulations.report.waterfall import STAGES

KIB, GB = 1024, 1e9


def key_figures(result: BalanceResult, name: str) -> Table:
    """How fast and how even: a row for each policy."""
    names = list(result.policies)
    columns = [
        Column(title="policy"),
        Column(title="throughput", unit="tokens/s", form=",.0f", best="high"),
        Column(title="gain", unit="%", form="+.1f", best="high"),
        Column(title="mean imbalance", form=".3f", best="low"),
        Column(title="p99", form=".3f", best="low"),
        Column(title="planned", form=".3f", best="low"),
        Column(title="mean difference", unit="%", form=",.1f", best="low"),
        Column(title="step mean", unit="ms", form=",.2f", best="low"),
        Column(title="step p99", unit="ms", form=",.2f", best="low"),
        Column(title="slowest rank", form=",.0f"),
        Column(title="in steps", unit="%", form=".1f"),
    ]
    first = result.policies[names[0]].throughput if names else math.nan
    rows = [_figures_of(label_of(n), policy, first) for n, policy in result.policies.items()]
    return Table(
        name=f"{name}-policies",
        caption="Every policy met the same load. The best of a column is bold; the gain is over the "
        "first row. Imbalance is the busiest rank's tokens over the mean of the ranks, of each layer "
        "of each step (1 is perfect); the difference is the busiest less the idlest rank's over "
        "that mean. The slowest rank is the one that others waited for most often.",
        columns=columns,
        rows=rows,
        swatches=[colour_of(n, names) for n in names],
    )


def _figures_of(label: str, policy: Policy, first: float) -> Sequence[str | float | None]:
    return (
        label,
        policy.throughput,
        100 * (policy.throughput / first - 1) if first > 0 else math.nan,
        policy.imbalance_mean,
        policy.imbalance_p99,
        policy.planned_imbalance,
        100 * policy.difference_mean,
        policy.step_ms_mean,
        policy.step_ms_p99,
        policy.straggler.rank,
        100 * policy.straggler.share,
    )


def traffic(result: BalanceResult, name: str) -> Table:
    """Bytes of tokens and of experts, a row for each policy."""
    names = list(result.policies)
    return Table(
        name=f"{name}-traffic",
        caption="Bytes of a token in one layer, dispatch and combine together; and what moving "
        "experts took in all. Throughput above includes its cost, here it does not.",
        columns=[
            Column(title="policy"),
            Column(title="between nodes", unit="KiB/token", form=",.2f", best="low"),
            Column(title="rows between nodes", unit="per token", form=",.2f", best="low"),
            Column(title="between ranks", unit="KiB/token", form=",.2f", best="low"),
            Column(title="rebalances", form=",.0f"),
            Column(title="experts moved", form=",.0f"),
            Column(title="moved", unit="GB", form=",.2f"),
            Column(title="throughput without", unit="tokens/s", form=",.0f"),
        ],
        rows=[(label_of(n), *_traffic_of(policy)) for n, policy in result.policies.items()],
        swatches=[colour_of(n, names) for n in names],
    )


def _traffic_of(policy: Policy) -> Sequence[float]:
    return (
        policy.node_bytes_per_token / KIB,
        policy.node_rows_per_token,
        policy.rank_bytes_per_token / KIB,
        len(policy.rebalances),
        policy.moves,
        policy.migrated_bytes / GB,
        policy.throughput_bare,
    )


def layer_times(result: BalanceResult, name: str) -> Table:
    """What the waterfall shows, as numbers."""
    parts = (*STAGES, "exposed", "hidden")
    known = {n: p.layer_ms for n, p in result.policies.items() if p.layer_ms}
    return Table(
        name=f"{name}-layer-ms",
        caption="Milliseconds of one MoE layer; exposed and hidden are of dispatch and combine "
        "together.",
        columns=[Column(title="policy")]
        + [Column(title=part, unit="ms", form=",.3f") for part in parts],
        rows=[[label_of(n), *(ms.get(part) for part in parts)] for n, ms in known.items()],
        swatches=[colour_of(n, list(result.policies)) for n in known],
    )


def rebalances(result: BalanceResult, name: str) -> Table | None:
    """Each time that a policy moved experts; None where none did."""
    names = list(result.policies)
    moved = [(n, one) for n, policy in result.policies.items() for one in policy.rebalances]
    if not moved:
        return None
    return Table(
        name=f"{name}-rebalances",
        caption="Every time that experts moved.",
        columns=[
            Column(title="policy"),
            Column(title="step", form=",.0f"),
            Column(title="layers", form=",.0f"),
            Column(title="moves", form=",.0f"),
            Column(title="moved", unit="GB", form=",.3f"),
            Column(title="pause", unit="ms", form=",.1f"),
        ],
        rows=[
            (label_of(n), one.step, one.layers, one.moves, one.bytes / GB, 1000 * one.pause_s)
            for n, one in moved
        ],
        swatches=[colour_of(n, names) for n, _ in moved],
        folded=len(moved) > 12,
    )
