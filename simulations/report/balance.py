"""The chapter of `simulate balance`: policies side by side on the same load.

L MoE layers, E experts, R ranks, N nodes.
"""

import math
from collections.abc import Sequence
from functools import partial

from simulations.report import balance_figures as figures
from simulations.report.balance_result import BalanceResult, Policy
from simulations.report.chapter import (
    Block,
    Chapter,
    Choice,
    Note,
    Section,
    facts_of,
    slugs,
    title_of,
)
from simulations.report.picture import draw
from simulations.report.style import colour_of, label_of
from simulations.report.tables import Column, DataFile, Table, cells, curves

KIB, GB = 1024, 1e9
WHAT_POLICIES_DO = {
    "none": "experts stay where they start; nothing ever moves",
    "eplb": "DeepSeek's EPLB, planned anew from the mean load of each interval; an expert's copies "
    "share its tokens evenly; steps wait while the weights are rewritten",
    "eplb_relabel": "EPLB's plans with ranks and slots renamed so that most experts are there already",
    "static": "our plans, carried out in the background when they pay; copies share evenly",
    "ours": "the same plans; each batch is also divided anew over the copies, without moving a byte",
}


def balance_chapter(result: BalanceResult, name: str) -> Chapter:
    sections = [
        _key_figures(result, name),
        _over_time(result, name),
        _rank_loads(result, name),
        _traffic(result, name),
        _waterfall(result, name),
        _expert_loads(result, name),
        _rebalances(result, name),
    ]
    return Chapter(
        name=name,
        title=title_of(result, "Balance of experts' load"),
        result=result,
        facts=facts_of(result),
        sections=[section for section in sections if section is not None],
        data=_data(result, name),
    )


def _key_figures(result: BalanceResult, name: str) -> Section:
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
    table = Table(
        name=f"{name}-policies",
        caption="Every policy met the same load. The best of a column is bold; the gain is over the "
        "first row. Imbalance is the busiest rank's tokens over the mean of the ranks, of each layer "
        "of each step (1 is perfect); the difference is the busiest less the idlest rank's over "
        "that mean. The slowest rank is the one that others waited for most often.",
        columns=columns,
        rows=rows,
        swatches=[colour_of(n, names) for n in names],
    )
    terms = [
        (label_of(n), colour_of(n, names), WHAT_POLICIES_DO[n])
        for n in names
        if n in WHAT_POLICIES_DO
    ]
    return Section(title="Key figures", blocks=[table, Note(terms=terms)])


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


def _over_time(result: BalanceResult, name: str) -> Section | None:
    blocks: list[Block] = []
    series = [policy.series for policy in result.policies.values()]
    if any(one.balancedness.size or one.throughput.size for one in series):
        blocks.append(
            draw(
                f"{name}-over-time",
                "Balancedness and throughput",
                "Higher is better in both. Ticks below mark the steps in which a policy moved "
                "experts.",
                "Curves of balancedness and of throughput by step, one for each policy, with "
                "rebalances marked.",
                partial(figures.over_time, result=result),
                height=6.2,
            )
        )
    both = [one for one in series if one.balancedness.size and one.planned_balancedness.size]
    if both:
        blocks.append(
            draw(
                f"{name}-planned-served",
                "Planned against served",
                "What a placement promises for the mean load that it was planned for, and what the "
                "batches had. The shaded gap is what no plan from the past can see.",
                "For each policy, planned balancedness dashed and served balancedness solid, by step.",
                partial(figures.planned_against_served, result=result),
                height=0.9 + 2.1 * -(-len(both) // 3),
            )
        )
    return Section(title="Over time", blocks=blocks) if blocks else None


def _rank_loads(result: BalanceResult, name: str) -> Section | None:
    loads = {n: p.rank_load_LR for n, p in result.policies.items() if p.rank_load_LR.known()}
    if not loads:
        return None
    pictures = [
        draw(
            f"{name}-ranks-{slug}",
            label_of(n),
            "",
            f"Heat maps of the load of each rank in each MoE layer under {label_of(n)}, in the first "
            "and in the last tenth of the run.",
            partial(figures.rank_loads, result=result, loads=of_policy),
            height=3.7,
        )
        for slug, (n, of_policy) in zip(slugs(loads), loads.items(), strict=True)
    ]
    choice = Choice(
        name=f"{name}-ranks",
        labels=[picture.title for picture in pictures],
        pictures=pictures,
        shown=(0, len(pictures) - 1),
    )
    return Section(
        title="Load of ranks, layer by layer",
        text="A column is a layer, a row a rank. A layer lasts as long as its most loaded rank takes: "
        "orange costs time, blue waits. Lines divide nodes.",
        blocks=[choice],
    )


def _traffic(result: BalanceResult, name: str) -> Section:
    names = list(result.policies)
    blocks: list[Block] = [
        Table(
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
    ]
    maps = [policy for policy in result.policies.values() if policy.node_traffic_NN.size]
    if maps:
        blocks.append(
            draw(
                f"{name}-node-traffic",
                "Bytes between nodes",
                "Per token and layer, from the node of a row to that of a column; the title has the "
                "sum. What stays inside a node (grey) is not part of the colours.",
                "Heat maps of the bytes per token between each pair of nodes, one for each policy.",
                partial(figures.node_traffic, result=result),
                height=0.8 + 3.3 * -(-len(maps) // 3),
            )
        )
    return Section(title="Traffic and moves", blocks=blocks)


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


def _waterfall(result: BalanceResult, name: str) -> Section | None:
    count = sum(bool(policy.layer_ms) for policy in result.policies.values())
    if not count:
        return None
    picture = draw(
        f"{name}-waterfall",
        "One layer, stage after stage",
        "Mean over steps and layers of what the slowest rank takes. Communication that runs under "
        "computation does not make the layer longer; what is exposed does.",
        "For each policy, bars of the stages of a layer, each beginning where the last one ends.",
        partial(figures.waterfall, result=result),
        height=1.1 + 2.0 * -(-count // 2),
    )
    return Section(title="Where a layer's time goes", blocks=[picture, _layer_table(result, name)])


def _layer_table(result: BalanceResult, name: str) -> Table:
    parts = (*figures.STAGES, "exposed", "hidden")
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


def _expert_loads(result: BalanceResult, name: str) -> Section | None:
    if not result.expert_load_LE.known():
        return None
    picture = draw(
        f"{name}-experts",
        "Load of experts, layer by layer",
        "What the gates choose, whatever the policy: tokens of an expert over the mean of its layer.",
        "Heat map of the load of each expert in each MoE layer.",
        partial(figures.expert_loads, result=result),
        height=3.5,
    )
    return Section(title="The workload", blocks=[picture])


def _rebalances(result: BalanceResult, name: str) -> Section | None:
    names = list(result.policies)
    moved = [(n, one) for n, policy in result.policies.items() for one in policy.rebalances]
    if not moved:
        return None
    table = Table(
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
    return Section(title="Rebalances", blocks=[table])


def _data(result: BalanceResult, name: str) -> list[DataFile]:
    """The numbers behind the pictures, one row for each point or cell."""
    files = []
    for slug, policy in zip(slugs(result.policies), result.policies.values(), strict=True):
        series = policy.series
        if series.step.size:
            files.append(curves(f"{name}-series-{slug}", series))
        for when, map_LR in policy.rank_load_LR.known().items():
            files.append(cells(f"{name}-ranks-{slug}-{when}", ("layer", "rank", "load"), map_LR))
        if policy.node_traffic_NN.size:
            header = ("from node", "to node", "traffic (bytes/token)")
            files.append(cells(f"{name}-node-traffic-{slug}", header, policy.node_traffic_NN))
    for when, map_LE in result.expert_load_LE.known().items():
        files.append(cells(f"{name}-experts-{when}", ("layer", "expert", "load"), map_LE))
    return files
