"""The chapter of `simulate balance`: policies side by side on the same load."""

from simulations.report import balance_pictures as pictures
from simulations.report import balance_tables as tables
from simulations.report.balance_result import BalanceResult
from simulations.report.chapter import Chapter, Note, Section, facts_of, title_of
from simulations.report.style import colour_of, label_of

WHAT_POLICIES_DO = {
    "none": "experts stay in the order of their numbers, one copy of each",
    "eplb": "DeepSeek's EPLB, planned anew from the mean load since its last plan; an expert's copies "
    "share its tokens evenly; steps wait while weights are rewritten",
    "eplb_relabel": "EPLB's plans with their ranks renamed so that more experts stay where they are",
    "static": "our plans, carried out in the background when they pay; the copy depends on the rank "
    "that a token comes from",
    "ours": "the same plans; each batch divides anew over the copies by its own counts",
}


def balance_chapter(result: BalanceResult, name: str) -> Chapter:
    layer = pictures.layer(result, name)
    moves = tables.rebalances(result, name)
    sections = [
        Section(title="Key figures", blocks=[tables.key_figures(result, name), _policies(result)]),
        Section(title="Over time", blocks=pictures.over_time(result, name)),
        Section(
            title="Load of ranks, layer by layer",
            text="A column is a layer, a row a rank. A layer lasts as long as its most loaded rank "
            "takes: orange costs time, blue waits. Lines divide nodes.",
            blocks=pictures.rank_loads(result, name),
        ),
        Section(
            title="Traffic and moves",
            blocks=[tables.traffic(result, name), *pictures.node_traffic(result, name)],
        ),
        Section(
            title="Where a layer's time goes",
            blocks=[*layer, tables.layer_times(result, name)] if layer else [],
        ),
        Section(title="The workload", blocks=pictures.expert_loads(result, name)),
        Section(title="Rebalances", blocks=[moves] if moves else []),
    ]
    return Chapter(
        name=name,
        title=title_of(result, "Balance of experts' load"),
        result=result,
        facts=facts_of(result),
        sections=[section for section in sections if section.blocks],
        data=pictures.data(result, name),
    )


def _policies(result: BalanceResult) -> Note:
    """What each of them does, beside its colour."""
    return Note(
        terms=[
            (label_of(name), colour_of(name, result.policies), WHAT_POLICIES_DO[name])
            for name in result.policies
            if name in WHAT_POLICIES_DO
        ]
    )
