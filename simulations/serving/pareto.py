"""Throughput against speed: the same cluster with more and more users, in a steady state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from simulations.cost import CostModel
from simulations.serving.arrivals import Lengths, closed_arrivals
from simulations.serving.result import tpot_s, ttft_s
from simulations.serving.setup import Served, build

GENERATIONS = 3
"""Requests of a run, per user. What is measured lies between the end of the first generation, whose
prompts all came at once, and that of the second; the third keeps the number of users up meanwhile."""


def parse_concurrency(text: str) -> tuple[int, ...]:
    """`8,64,512`; ValueError for anything but positive whole numbers."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and 0 < int(part) <= 10**6 for part in parts):
        raise ValueError(f"{text!r} is not a list of numbers of users such as 8,64,512")
    return tuple(sorted({int(part) for part in parts}))


def pareto_point(
    served: Served,
    cost: CostModel,
    concurrency: int,
    *,
    prompt: Lengths,
    output: Lengths,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, Any] | None:
    """One number of users; None if `stop` said so before the steady state was over.

    Raises ValueError if so many requests are refused that there is none.
    """
    arrivals = closed_arrivals(
        num_requests=GENERATIONS * concurrency, prompt=prompt, output=output, seed=served.seed
    )
    simulation = build(served, cost, arrivals, concurrency=concurrency)
    finished = simulation.front_end.finished
    simulation.run(stop=lambda: len(finished) >= 2 * concurrency or stop())
    if len(finished) < 2 * concurrency:
        if stop():
            return None
        raise ValueError(
            f"{simulation.front_end.num_rejected + simulation.front_end.num_failed} of "
            f"{simulation.front_end.num_submitted} requests of {concurrency} users do not fit "
            "max_model_len or the KV cache: no steady state"
        )
    start_s, end_s = finished[concurrency - 1].finish_s, finished[2 * concurrency - 1].finish_s
    samples = simulation.record.samples()
    inside = (samples["end_s"] > start_s) & (samples["end_s"] <= end_s)
    rate = float(samples["output_tokens"][inside].sum()) / (end_s - start_s)
    settled = finished[concurrency : 2 * concurrency]
    tpot = tpot_s(settled)
    return {
        "concurrency": concurrency,
        "tokens_per_s_per_user": 1 / float(np.mean(tpot)) if tpot else None,
        "tokens_per_s_per_rank": rate / served.deployment.num_ranks,
        "ttft_p50_s": float(np.median(ttft_s(settled))),
    }
