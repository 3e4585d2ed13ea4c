"""Tokens of a recorded run: to which slots they went, what slots computed, what links carried.

T tokens, L layers with experts, K experts per token, Q steps, S slots, R ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from simulations.traffic import added, link_bytes, node_visits
from simulations.twin.check import Check, layer_name
from simulations.twin.recording import Recording
from simulations.twin.recording_checks import STAGES
from simulations.twin.replay_choices import Choices, Step
from simulations.wire import ESCAPE_BYTES, Wire


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
                        f"step {step.number}, {layer_name(recording, layer)}, rank {rank}: token {first}"
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
                    f"step {step.number}, {layer_name(recording, layer)}, rank {slot // slots_per_rank}: "
                    f"slot {slot} had {recorded_S[slot]} tokens, replay {replayed_S[slot]}"
                )
    return found


class Sent(NamedTuple):
    """What a number of bytes is about; `stage` counts STAGES."""

    step: int
    layer: int
    stage: int
    source: int
    destination: int


def check_bytes(recording: Recording, steps: Sequence[Step], choices: Choices) -> Check:
    """What every rank booked as sent: by step, layer, stage, source and destination."""
    recorded = {Sent(*key): num_bytes for *key, num_bytes in recording.arrays["sent"].tolist()}
    replayed = dict(_counted(choices))
    for step in steps:
        replayed.update(_sent_in(recording, step, choices.slots_TLK))
    found = Check(name="bytes by link", compared=len(recorded.keys() | replayed.keys()))
    for sent in sorted(recorded.keys() | replayed.keys()):
        theirs, ours = recorded.get(sent, 0), replayed.get(sent, 0)
        if theirs != ours:
            found.fail(
                f"step {sent.step}, layer {sent.layer}, rank {sent.source}: {STAGES[sent.stage]} to "
                f"rank {sent.destination} had {theirs} bytes, replay {ours}"
            )
    return found


def _counted(choices: Choices) -> Iterator[tuple[Sent, int]]:
    """The counts by which ranks choose."""
    for row in choices.counted.step_rows():
        key = Sent(
            step=row["step"],
            layer=row["layer"],
            stage=STAGES.index(row["stage"]),
            source=row["source"],
            destination=row["destination"],
        )
        yield key, row["num_bytes"]


def _sent_in(
    recording: Recording, step: Step, slots_TLK: NDArray[np.int32]
) -> Iterator[tuple[Sent, int]]:
    """The tokens of a step, and what came back."""
    topology, wire = recording.config.parallel.topology, wire_of(recording)
    slots_per_rank = recording.first_placement.slots_per_rank
    escapes = recording.arrays["escapes"]
    escapes = escapes[escapes[:, 0] == step.number]
    for layer, model_layer in enumerate(recording.model.moe_layers):
        visits = [
            node_visits([slots_TLK[mine, layer] for mine in of_ranks], topology, slots_per_rank)
            for of_ranks in step.tokens
        ]
        links = added(link_bytes(of_micro_batch, wire) for of_micro_batch in visits)
        for _, _, source, destination, count in escapes[escapes[:, 1] == model_layer].tolist():
            links["combine/exchange"][source, destination] += count * ESCAPE_BYTES
        for stage, bytes_RR in links.items():
            for source, destination in np.argwhere(bytes_RR).tolist():
                key = Sent(step.number, model_layer, STAGES.index(stage), source, destination)
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
