"""Loads and placements of a recorded run: what ranks counted, and what was planned from it.

Q steps, R ranks, L layers with experts, E logical experts, T tokens, K experts per token.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from simulations.twin.check import SHOWN, Check, layer_name
from simulations.twin.looks import ROWS_SAMPLED, Looks, report
from simulations.twin.recording import Rebalance, Recording


def _counters(recording: Recording) -> NDArray[np.int64]:
    """[Q, R, L, E]: the gates' choices since the start, after each step."""
    _, num_ranks, layers, experts = recording.arrays["routed"].shape
    counts = np.zeros((recording.num_steps, num_ranks, layers, experts), dtype=np.int64)
    chunks, routing_TLK = recording.arrays["chunks"], recording.arrays["routing"]
    step_T = np.repeat(chunks[:, 0], chunks[:, 3])
    rank_T = np.repeat(chunks[:, 2], chunks[:, 3])
    token, layer, place = np.nonzero(routing_TLK >= 0)
    np.add.at(counts, (step_T[token], rank_T[token], layer, routing_TLK[token, layer, place]), 1)
    return counts.cumsum(axis=0)


def check_loads(recording: Recording) -> Check:
    """The counters that every rank reported at every look, against the gates' choices."""
    found = Check(name="expert loads", compared=recording.arrays["routed"].size)
    counters = _counters(recording)
    for look, reported in enumerate(recording.arrays["routed"]):
        step = _step_of(recording, look)
        differ = np.argwhere(reported != counters[step])
        for rank, layer, expert in differ[:SHOWN].tolist():
            found.fail(
                f"step {step}, {layer_name(recording, layer)}, rank {rank}: expert {expert} was chosen "
                f"{reported[rank, layer, expert]} times so far, replay "
                f"{counters[step, rank, layer, expert]}",
                0,
            )
        found.num_wrong += len(differ)
    return found


def check_placements(recording: Recording) -> Check:
    """What the planner makes of the replayed loads, against what came in force."""
    found, model = Check(name="placements"), recording.model
    first = recording.first_placement
    looks = Looks(recording.config.eplb_config, first, model.gate.num_experts_per_token)
    counters, taken, epoch = _counters(recording), 0, 0
    for rebalance in recording.rebalances:
        for look in range(taken, rebalance.looks):
            step = _step_of(recording, look)
            looks.add(
                [
                    report(counters[step, rank], _sampled(recording, step, rank))
                    for rank in range(first.num_ranks)
                ]
            )
        taken = max(taken, rebalance.looks)
        if rebalance.epoch != epoch:
            found.fail(f"a rebalance was planned from epoch {rebalance.epoch}, replay {epoch}")
        drafted = [(i, row.tolist()) for i, row in looks.draft(recording.placements[epoch]).rows]
        found.compared += max(len(drafted), len(rebalance.rows))
        if drafted != rebalance.rows:
            found.fail(_first_difference(recording, rebalance, drafted))
        epoch += len(rebalance.rows)
    return found


def _step_of(recording: Recording, look: int) -> int:
    """The last step that a look has seen."""
    return (look + 1) * recording.looks_every - 1


def _sampled(recording: Recording, step: int, rank: int) -> list[NDArray[np.integer]]:
    """By layer, the experts of the tokens that the rank reported after this step."""
    chunks = recording.arrays["chunks"]
    at = np.flatnonzero((chunks[:, 0] == step) & (chunks[:, 2] == rank))[-1]
    end = int(chunks[: at + 1, 3].sum())
    rows_TLK = recording.arrays["routing"][end - chunks[at, 3] : end][:ROWS_SAMPLED]
    return [rows_TLK[:, layer] for layer in range(rows_TLK.shape[1])]


def _first_difference(
    recording: Recording, rebalance: Rebalance, drafted: Sequence[tuple[int, list[int]]]
) -> str:
    asked, recorded = f"rebalance after {rebalance.looks} looks", rebalance.rows
    if [layer for layer, _ in recorded] != [layer for layer, _ in drafted]:
        theirs, ours = ([layer_name(recording, i) for i, _ in rows] for rows in (recorded, drafted))
        return f"{asked}: changed {theirs}, replay {ours}"
    layer, row, again = next(
        (layer, row, again)
        for (layer, row), (_, again) in zip(recorded, drafted, strict=True)
        if row != again
    )
    return f"{asked}: {layer_name(recording, layer)} got slots {row}, replay {again}"
