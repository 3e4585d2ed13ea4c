"""The chapter of `simulate serve`: requests over time."""

import math
from functools import partial

from simulations.report import serve_figures as figures
from simulations.report.chapter import Block, Chapter, Section, facts_of, title_of
from simulations.report.picture import draw
from simulations.report.results import Series
from simulations.report.serve_result import ServeResult, Spread
from simulations.report.tables import Column, Table, curves

GB = 1e9


def serve_chapter(result: ServeResult, name: str) -> Chapter:
    sections = [
        _key_figures(result, name),
        _latencies(result, name),
        _over_time(result, name),
        _pareto(result, name),
        _memory(result, name),
    ]
    series: dict[str, Series] = {f"{name}-cdf": result.cdf, f"{name}-series": result.series}
    return Chapter(
        name=name,
        title=title_of(result, "Serving"),
        result=result,
        facts=facts_of(result),
        sections=[section for section in sections if section is not None],
        data=[curves(file, one) for file, one in series.items() if len(one)],
    )


def _key_figures(result: ServeResult, name: str) -> Section:
    spreads = Table(
        name=f"{name}-latency",
        caption="Over the requests that finished.",
        columns=[Column(title="latency"), Column(title="unit")]
        + [Column(title=title, form=",.3f") for title in ("mean", "p50", "p90", "p99")],
        rows=[
            ("TTFT: time to first token", "s", *_of(result.ttft_s)),
            ("TPOT: time per output token", "ms", *(1000 * value for value in _of(result.tpot_s))),
        ],
    )
    blocks: list[Block] = [spreads]
    if result.throughput:
        blocks.append(_named(f"{name}-throughput", "Throughput.", "tokens/s", result.throughput))
    if result.requests:
        blocks.append(_named(f"{name}-requests", "What became of requests.", "", result.requests))
    return Section(title="Key figures", blocks=blocks)


def _of(spread: Spread) -> tuple[float, ...]:
    return spread.mean, spread.p50, spread.p90, spread.p99


def _named(name: str, caption: str, unit: str, values: dict[str, float]) -> Table:
    """A row of figures under their names."""
    columns = []
    for key, value in values.items():
        title = key.replace("_", " ").replace(" per s", "/s").replace(" per ", "/")
        whole = math.isnan(value) or value == int(value)
        title = title.replace("tokens/s/", "tokens/s per ") if unit else title
        columns.append(Column(title=title, form=",.0f" if whole else ",.1f"))
    return Table(name=name, caption=caption, columns=columns, rows=[list(values.values())])


def _latencies(result: ServeResult, name: str) -> Section | None:
    if not (result.cdf.ttft_s.size or result.cdf.tpot_s.size):
        return None
    picture = draw(
        f"{name}-latencies",
        "Distribution of latencies",
        "A point of a curve: so many per cent of the requests waited at most so long.",
        "Cumulative distributions of the time to first token and of the time per output token.",
        partial(figures.latencies, result=result),
        height=3.6,
    )
    return Section(title="Latency", blocks=[picture])


def _over_time(result: ServeResult, name: str) -> Section | None:
    blocks: list[Block] = []
    series = result.series
    curves = (series.output_tokens_per_s, series.running, series.kv_usage, series.balancedness)
    known = sum(bool(values.size) for values in curves)
    if known:
        blocks.append(
            draw(
                f"{name}-over-time",
                "Tokens, requests, cache and balance",
                "Vertical lines mark failures, recoveries and rebalances." if result.events else "",
                "Output tokens per second, running and waiting requests, use of the cache and "
                "balancedness by time, with events marked.",
                partial(figures.over_time, result=result),
                height=0.9 + 1.5 * known,
            )
        )
    if result.events:
        blocks.append(
            Table(
                name=f"{name}-events",
                caption="What happened.",
                columns=[
                    Column(title="time", unit="s", form=",.2f"),
                    Column(title="kind", tones={"failure": "bad", "recovery": "good"}),
                    Column(title="what", wide=True),
                ],
                rows=[(event.time_s, event.kind, event.what) for event in result.events],
                folded=len(result.events) > 12,
            )
        )
    return Section(title="Over time", blocks=blocks) if blocks else None


def _pareto(result: ServeResult, name: str) -> Section | None:
    rows = [
        (p.concurrency, p.tokens_per_s_per_user, p.tokens_per_s_per_rank, p.ttft_p50_s)
        for p in result.pareto
    ]
    known = [row for row in rows if not math.isnan(row[1] + row[2])]
    if not known:
        return None
    picture = draw(
        f"{name}-pareto",
        "Throughput against speed",
        "Numbers are requests at once. Nothing is better in both than the filled points; hollow ones "
        "are beaten by another.",
        "Tokens per second of each rank against tokens per second of each user, by concurrency.",
        partial(figures.pareto, points=result.pareto),
        height=4.4,
        width=8.6,
    )
    table = Table(
        name=f"{name}-pareto",
        caption="The same as numbers.",
        columns=[
            Column(title="requests at once", form=",.0f"),
            Column(title="each user", unit="tokens/s", form=",.1f", best="high"),
            Column(title="each rank", unit="tokens/s", form=",.1f", best="high"),
            Column(title="TTFT p50", unit="s", form=",.3f", best="low"),
        ],
        rows=rows,
    )
    return Section(title="Throughput or speed", blocks=[picture, table])


def _memory(result: ServeResult, name: str) -> Section | None:
    known = {key: size for key, size in result.memory.items() if not math.isnan(size)}
    if not any(size > 0 for key, size in known.items() if key not in figures.NOT_USES):
        return None
    picture = draw(
        f"{name}-memory",
        "Memory of a rank",
        "What the fullest rank keeps.",
        "A bar of the bytes that the fullest rank keeps, by what they are for.",
        partial(figures.memory, result=result),
        height=1.5,
    )
    table = Table(
        name=f"{name}-memory",
        caption="The same as numbers.",
        columns=[Column(title="use"), Column(title="size", unit="GB", form=",.2f")],
        rows=[(key.replace("_", " "), size / GB) for key, size in known.items()],
        folded=True,
    )
    return Section(title="Memory", blocks=[picture, table])
