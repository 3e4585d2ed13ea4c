"""The twin check: does the simulation arrive at exactly what the real cluster did?

A recording says what the gates chose, which requests came, and after which looks a rebalance was asked
for. From that alone the production router, scheduler and planner, and `traffic.py`, must find what
else was recorded: batches, expert loads, placements, the slot of every token, what every slot had to
compute, and the bytes on every link. Not one number may differ.

T tokens, L layers with experts, K experts per token, R ranks, E logical experts, S slots.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from cluster.engine.plan import StepPlan
from router.load import LoadFileError
from router.placement import Placement
from simulations.looks import Looks, report
from simulations.recording import STAGES, Recording
from simulations.replay_batches import chunks_of, recorded_plans, replay_batches
from simulations.replay_choices import Choices, Step, layers_by_epoch, replay_choices
from simulations.traffic import added, link_bytes, node_visits
from simulations.wire import ESCAPE_BYTES, Wire

SHOWN = 20
"""Mismatches of one check that are told in words."""
ROWS_REPORTED = 32


@dataclass(kw_only=True)
class Check:
    """`compared` numbers (or plans); of `num_wrong` of them the first are described."""

    name: str
    compared: int = 0
    num_wrong: int = 0
    wrong: list[str] = field(default_factory=list)

    def fail(self, message: str, count: int = 1) -> None:
        self.num_wrong += count
        if len(self.wrong) < SHOWN:
            self.wrong.append(message)


def check(recording: Recording) -> list[Check]:
    """All checks. Raises LoadFileError for a recording that is none of a run."""
    try:
        plans = list(recorded_plans(recording))
    except ValueError as error:
        raise LoadFileError(f"array 'plans': {error}") from error
    batches = check_batches(recording, plans)
    loads = check_loads(recording)
    placements, by_epoch = check_placements(recording)
    if batches.num_wrong:
        return [batches, loads, placements]  # who owns which token is not known
    steps = list(_steps(recording, plans, by_epoch))
    choices = replay_choices(recording, steps)
    for step, wanted in zip(steps, choices.micro_batches, strict=True):
        if len(step.tokens) != wanted:
            batches.fail(
                f"step {step.number}: ran in {len(step.tokens)} micro-batches, replay {wanted}"
            )
    return [
        batches,
        loads,
        placements,
        check_slots(recording, steps, choices),
        check_slot_tokens(recording, steps, choices),
        check_bytes(recording, steps, choices),
    ]


# -- batches ---------------------------------------------------------------------------------------


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


def _steps(
    recording: Recording, plans: Sequence[list[StepPlan]], by_epoch: Sequence[Placement]
) -> Iterator[Step]:
    layers, chunks = layers_by_epoch(by_epoch), recording.arrays["chunks"]
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


# -- loads and placements --------------------------------------------------------------------------


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
        step = (look + 1) * recording.looks_every - 1
        differ = np.argwhere(reported != counters[step])
        for rank, layer, expert in differ[:SHOWN].tolist():
            found.fail(
                f"step {step}, {_layer(recording, layer)}, rank {rank}: expert {expert} was chosen "
                f"{reported[rank, layer, expert]} times so far, replay "
                f"{counters[step, rank, layer, expert]}",
                0,
            )
        found.num_wrong += len(differ)
    return found


def check_placements(recording: Recording) -> tuple[Check, list[Placement]]:
    """The planner's rows from replayed loads, and the placements that were in force, by epoch."""
    found = Check(name="placements")
    by_epoch = [recording.first_placement]
    model = recording.model
    looks = Looks(recording.config.eplb_config, by_epoch[0], model.gate.num_experts_per_token)
    counters, taken = _counters(recording), 0
    for rebalance in recording.rebalances:
        for look in range(taken, rebalance.looks):
            step = (look + 1) * recording.looks_every - 1
            looks.add(
                [
                    report(counters[step, rank], _sampled(recording, step, rank))
                    for rank in range(recording.config.parallel.world_size)
                ]
            )
        taken = rebalance.looks
        before = by_epoch[-1]
        if rebalance.epoch != before.epoch:
            found.fail(
                f"a rebalance was planned from epoch {rebalance.epoch}, replay {before.epoch}"
            )
        drafted = [(layer, row.tolist()) for layer, row in looks.draft(before).rows]
        found.compared += max(len(drafted), len(rebalance.rows))
        if drafted != rebalance.rows:
            found.fail(_first_difference(recording, rebalance.looks, rebalance.rows, drafted))
        for layer, row in rebalance.rows:
            try:
                by_epoch.append(by_epoch[-1].with_layers({layer: np.asarray(row, dtype=np.int64)}))
            except (ValueError, IndexError, TypeError) as error:
                raise LoadFileError(f"rebalance after {rebalance.looks} looks: {error}") from error
    return found, by_epoch


def _sampled(recording: Recording, step: int, rank: int) -> list[NDArray[np.integer]]:
    """By layer, the experts of the tokens that the rank reported after this step."""
    chunks = recording.arrays["chunks"]
    at = np.flatnonzero((chunks[:, 0] == step) & (chunks[:, 2] == rank))[-1]
    end = int(chunks[: at + 1, 3].sum())
    rows_TLK = recording.arrays["routing"][end - chunks[at, 3] : end][:ROWS_REPORTED]
    return [rows_TLK[:, layer] for layer in range(rows_TLK.shape[1])]


def _first_difference(
    recording: Recording,
    looks: int,
    recorded: Sequence[tuple[int, list[int]]],
    drafted: Sequence[tuple[int, list[int]]],
) -> str:
    asked = f"rebalance after {looks} looks"
    if [layer for layer, _ in recorded] != [layer for layer, _ in drafted]:
        theirs, ours = ([_layer(recording, i) for i, _ in rows] for rows in (recorded, drafted))
        return f"{asked}: changed {theirs}, replay {ours}"
    layer, row, other = next(
        (layer, row, ours)
        for (layer, row), (_, ours) in zip(recorded, drafted, strict=True)
        if row != ours
    )
    return f"{asked}: {_layer(recording, layer)} got slots {row}, replay {other}"


# -- tokens ----------------------------------------------------------------------------------------


def check_slots(recording: Recording, steps: Sequence[Step], choices: Choices) -> Check:
    """Where every token went, for each of its experts."""
    recorded_TLK, replayed_TLK = recording.arrays["slots"], choices.slots_TLK
    found = Check(name="slots", compared=recorded_TLK.size)
    for step in steps:
        for micro_batch, of_ranks in enumerate(step.tokens):
            for rank, tokens in enumerate(of_ranks):
                differ_TLK = recorded_TLK[tokens] != replayed_TLK[tokens]
                for layer in np.flatnonzero(differ_TLK.any(axis=(0, 2))).tolist():
                    first = int(differ_TLK[:, layer].any(axis=1).argmax())
                    experts, theirs, ours = (
                        of_T[tokens][first, layer].tolist()
                        for of_T in (recording.arrays["routing"], recorded_TLK, replayed_TLK)
                    )
                    found.fail(
                        f"step {step.number}, {_layer(recording, layer)}, rank {rank}: token {first}"
                        f"{f' of micro-batch {micro_batch}' if micro_batch else ''} with experts "
                        f"{experts} went to slots {theirs}, replay {ours}",
                        int(differ_TLK[:, layer].sum()),
                    )
    return found


def check_slot_tokens(recording: Recording, steps: Sequence[Step], choices: Choices) -> Check:
    """What every slot had to compute, as the ranks with the slots counted it."""
    recorded_QLS = recording.arrays["slot_tokens"]
    found = Check(name="tokens of slots", compared=recorded_QLS.size)
    num_slots = recorded_QLS.shape[2]
    slots_per_rank = num_slots // recording.config.parallel.world_size
    for step in steps:
        whole = slice(step.tokens[0][0].start, step.tokens[-1][-1].stop)
        for layer, recorded_S in enumerate(recorded_QLS[step.number]):
            slots_TK = choices.slots_TLK[whole, layer]
            replayed_S = np.bincount(slots_TK[slots_TK >= 0], minlength=num_slots)
            for slot in np.flatnonzero(recorded_S != replayed_S).tolist():
                found.fail(
                    f"step {step.number}, {_layer(recording, layer)}, rank {slot // slots_per_rank}: "
                    f"slot {slot} had {recorded_S[slot]} tokens, replay {replayed_S[slot]}"
                )
    return found


def check_bytes(recording: Recording, steps: Sequence[Step], choices: Choices) -> Check:
    """What every rank booked as sent: by step, layer, stage, source and destination."""
    recorded: dict[tuple[int, ...], int] = {
        tuple(row[:5]): row[5] for row in recording.arrays["sent"].tolist()
    }
    replayed = {
        (
            row["step"],
            row["layer"],
            STAGES.index(row["stage"]),
            row["source"],
            row["destination"],
        ): (row["num_bytes"])
        for row in choices.counted.step_rows()
        if row["num_bytes"]
    }
    for step in steps:
        replayed.update(_sent_in(recording, step, choices.slots_TLK))
    found = Check(name="bytes by link", compared=len(recorded.keys() | replayed.keys()))
    for key in sorted(recorded.keys() | replayed.keys()):
        theirs, ours = recorded.get(key, 0), replayed.get(key, 0)
        if theirs != ours:
            step_number, layer, stage, source, destination = key
            found.fail(
                f"step {step_number}, layer {layer}, rank {source}: {STAGES[stage]} to rank "
                f"{destination} had {theirs} bytes, replay {ours}"
            )
    return found


def _sent_in(
    recording: Recording, step: Step, slots_TLK: NDArray[np.int32]
) -> Iterator[tuple[tuple[int, ...], int]]:
    topology, placement = recording.config.parallel.topology, recording.first_placement
    wire = wire_of(recording)
    escapes = recording.arrays["escapes"]
    escapes = escapes[escapes[:, 0] == step.number]
    for layer, model_layer in enumerate(recording.model.moe_layers):
        links = added(
            link_bytes(
                node_visits(
                    [slots_TLK[tokens, layer] for tokens in of_ranks],
                    topology,
                    placement.slots_per_rank,
                ),
                wire,
            )
            for of_ranks in step.tokens
        )
        for _, _, source, destination, count in escapes[escapes[:, 1] == model_layer].tolist():
            links["combine/exchange"][source, destination] += count * ESCAPE_BYTES
        for stage, bytes_RR in links.items():
            for source, destination in np.argwhere(bytes_RR).tolist():
                key = (step.number, model_layer, STAGES.index(stage), source, destination)
                yield key, int(bytes_RR[source, destination])


def wire_of(recording: Recording) -> Wire:
    """How rows of this run looked on the wire."""
    config, model = recording.config, recording.model
    return Wire(
        hidden=model.hidden_size,
        num_topk=model.gate.num_experts_per_token,
        num_slots=recording.first_placement.num_slots,
        dtype=config.dtype,
        dispatcher=config.comms.all2all_backend,
        dispatch_dtype=config.comms.dispatch_dtype,
        combine=config.comms.combine,
        combine_dtype=config.comms.combine_dtype,
    )


def _layer(recording: Recording, layer: int) -> str:
    return f"layer {recording.model.moe_layers[layer]}"
