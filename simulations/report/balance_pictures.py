"""The pictures of `simulate balance`, with their captions, and the numbers behind them.

L MoE layers, E experts, R ranks, N nodes.
"""

from functools import partial

from simulations.report import balance_figures as figures
from simulations.report.balance_result import BalanceResult
from simulations.report.chapter import Choice, slugs
from simulations.report.picture import Picture, draw
from simulations.report.style import label_of
from simulations.report.tables import DataFile, cells, curves
from simulations.report.waterfall import waterfall


def over_time(result: BalanceResult, name: str) -> list[Picture]:
    """Balancedness and throughput by step; what was planned against what was served."""
    pictures = []
    series = [policy.series for policy in result.policies.values()]
    if any(one.balancedness.size or one.throughput.size for one in series):
        pictures.append(
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
        pictures.append(
            draw(
                f"{name}-planned-served",
                "Planned against served",
                "What a placement promises for the mean load that it was planned for, and what the "
                "batches had. The shaded gap is what no plan from the past can see.",
                "For each policy, planned balancedness dashed and served balancedness solid, by step.",
                partial(figures.planned_against_served, result=result),
                height=1.1 + 2.1 * -(-len(both) // 3),
            )
        )
    return pictures


def rank_loads(result: BalanceResult, name: str) -> list[Choice]:
    """Heat maps of every policy, of which two are compared."""
    loads = {n: p.rank_load_LR for n, p in result.policies.items() if p.rank_load_LR.known()}
    if not loads:
        return []
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
    labels = [picture.title for picture in pictures]
    shown = (0, len(pictures) - 1)
    return [Choice(name=f"{name}-ranks", labels=labels, pictures=pictures, shown=shown)]


def node_traffic(result: BalanceResult, name: str) -> list[Picture]:
    """Which node sends how much to which."""
    maps = [policy for policy in result.policies.values() if policy.node_traffic_NN.size]
    if not maps:
        return []
    return [
        draw(
            f"{name}-node-traffic",
            "Bytes between nodes",
            "Per token and layer, from the node of a row to that of a column; the title has the "
            "sum. What stays inside a node (grey) is not part of the colours.",
            "Heat maps of the bytes per token between each pair of nodes, one for each policy.",
            partial(figures.node_traffic, result=result),
            height=0.8 + 3.3 * -(-len(maps) // 3),
        )
    ]


def layer(result: BalanceResult, name: str) -> list[Picture]:
    """Where a layer's time goes."""
    count = sum(bool(policy.layer_ms) for policy in result.policies.values())
    if not count:
        return []
    picture = draw(
        f"{name}-waterfall",
        "One layer, stage after stage",
        "Mean over steps and layers of what the slowest rank takes. Communication that runs under "
        "computation does not make the layer longer; what is exposed does.",
        "For each policy, bars of the stages of a layer, each beginning where the last one ends.",
        partial(waterfall, result=result),
        height=1.1 + 2.0 * -(-count // 2),
    )
    return [picture]


def expert_loads(result: BalanceResult, name: str) -> list[Picture]:
    """What the gates choose."""
    if not result.expert_load_LE.known():
        return []
    picture = draw(
        f"{name}-experts",
        "Load of experts, layer by layer",
        "What the gates choose, whatever the policy: tokens of an expert over the mean of its layer.",
        "Heat map of the load of each expert in each MoE layer.",
        partial(figures.expert_loads, result=result),
        height=3.5,
    )
    return [picture]


def data(result: BalanceResult, name: str) -> list[DataFile]:
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
