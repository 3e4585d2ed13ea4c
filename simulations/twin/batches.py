"""Batches of a recorded run: which tokens ran in which step, on which rank."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from cluster.engine.plan import StepPlan
from simulations.twin.check import Check
from simulations.twin.recording import Recording
from simulations.twin.replay_batches import chunks_of, replay_batches
from simulations.twin.replay_choices import Step, layers_by_epoch


def check_batches(recording: Recording, plans: Sequence[list[StepPlan]]) -> Check:
    """Every plan of every replica, and the tokens of every rank; up to the first difference."""
    found = Check(name="batches")
    replayed = replay_batches(recording)
    for step, recorded in zip(recording.arrays["steps"].tolist(), plans, strict=True):
        try:
            again = next(replayed)
        except (KeyError, ValueError, RuntimeError) as error:
            found.fail(f"step {step}: the scheduler cannot go on: {error!r}")
            return found
        for replica, (ours, theirs) in enumerate(zip(again, recorded, strict=True)):
            found.compared += 1
            if ours != theirs:
                found.fail(
                    f"step {step}, replica {replica}: {_describe(theirs)}, replay {_describe(ours)}"
                )
                return found
        if (step >= 0) != any(plan.num_tokens for plan in again):
            found.fail(f"step {step}: executed without tokens, or not executed with some")
            return found
    _check_chunks(recording, plans, found)
    return found


def _check_chunks(recording: Recording, plans: Sequence[list[StepPlan]], found: Check) -> None:
    chunks = recording.arrays["chunks"]
    of_steps = np.split(chunks, np.flatnonzero(np.diff(chunks[:, 0])) + 1) if len(chunks) else []
    tensor_parallel_size = recording.config.parallel.topology.tensor_parallel_size
    executed = [p for step, p in zip(recording.arrays["steps"], plans, strict=True) if step >= 0]
    if len(of_steps) != len(executed):
        found.fail(f"{len(executed)} steps were planned, {len(of_steps)} chose experts")
        return
    for step, (of_step, of_replicas) in enumerate(zip(of_steps, executed, strict=True)):
        micro_batches = 1 + int(of_step[:, 1].max())
        wanted = chunks_of(step, of_replicas, tensor_parallel_size, micro_batches)
        found.compared += len(wanted)
        if of_step.tolist() != [list(chunk) for chunk in wanted]:
            found.fail(
                f"step {step}: ranks chose experts for {of_step[:, 3].tolist()} tokens, replay "
                f"{[tokens for *_, tokens in wanted]}"
            )


def _describe(plan: StepPlan) -> str:
    items = ", ".join(f"{i.seq_id} from {i.start} +{len(i.token_ids)}" for i in plan.items[:4])
    return f"{plan.num_tokens} tokens (sequences {items}{', ...' if len(plan.items) > 4 else ''})"


def steps_of(recording: Recording, plans: Sequence[list[StepPlan]]) -> Iterator[Step]:
    """Every step that was executed, for a recording whose batches are right."""
    layers, chunks = layers_by_epoch(recording.placements), recording.arrays["chunks"]
    ends = np.cumsum(chunks[:, 3]).tolist()
    tokens: dict[int, list[list[slice]]] = {}
    for (step, micro_batch, _, count), end in zip(chunks.tolist(), ends, strict=True):
        of_step = tokens.setdefault(step, [])
        if micro_batch == len(of_step):
            of_step.append([])
        of_step[micro_batch].append(slice(end - count, end))
    arrays = recording.arrays
    for step, epoch, of_replicas in zip(arrays["steps"], arrays["epochs"], plans, strict=True):
        if step >= 0:
            yield Step(
                number=int(step),
                max_tokens=max(plan.num_tokens for plan in of_replicas),
                layers=layers[epoch],
                tokens=tokens[int(step)],
            )
