"""The twin check on real runs: all of it the same, and whatever is changed is found.

T tokens, L layers with experts, K experts per token.
"""

from dataclasses import replace

import numpy as np
import pytest

from cluster import offline
from comms.launch import RankError
from simulations.twin.check import Check
from simulations.twin.record import record
from simulations.twin.recording import Recording
from simulations.twin.recording_checks import STAGES
from simulations.twin.replay import check
from simulations.twin.replay_batches import recorded_plans
from tests.simulations.twin.runs import NUM_TOKENS, REQUESTS, arrivals, config_of, frames

NAMES = ["batches", "expert loads", "placements", "slots", "tokens of slots", "bytes by link"]


def differences(recording: Recording) -> dict[str, list[str]]:
    return {found.name: found.wrong for found in check(recording) if found.num_wrong}


def altered(recording: Recording, key: str, at: tuple[int, ...], value: int) -> Recording:
    array = recording.arrays[key].copy()
    assert array[at] != value
    array[at] = value
    return replace(recording, arrays={**recording.arrays, key: array})


# -- the same ---------------------------------------------------------------------------------------


def test_a_run_with_two_rebalances_is_replayed_exactly(recording):
    checks = {found.name: found for found in check(recording)}
    assert list(checks) == NAMES
    assert [found.wrong for found in checks.values()] == [[]] * len(NAMES)
    assert [found.num_wrong for found in checks.values()] == [0] * len(NAMES)
    arrays = recording.arrays
    assert checks["slots"].compared == arrays["routing"].size > 10_000
    assert checks["tokens of slots"].compared == arrays["slot_tokens"].size
    assert checks["bytes by link"].compared == len(arrays["sent"]) > 5_000


def test_the_run_has_what_makes_it_hard(recording):
    """Rebalances in force, preemptions, prompts among decoding, every stage, experts with a choice."""
    arrays = recording.arrays
    assert len(recording.rebalances) == 2
    assert all(rebalance.rows for rebalance in recording.rebalances)
    changes = sum(len(rebalance.rows) for rebalance in recording.rebalances)
    assert arrays["epochs"].tolist() == sorted(arrays["epochs"].tolist())
    assert set(arrays["epochs"]) >= {0, changes}
    items = [item for plans in recorded_plans(recording) for plan in plans for item in plan.items]
    starts = [item.seq_id for item in items if item.start == 0]
    assert len(starts) > REQUESTS, "some prompt was computed twice: its sequence was preempted"
    assert len({len(item.token_ids) for item in items}) > 2
    used = {STAGES[stage] for stage in arrays["sent"][:, 2]}
    assert used == {stage for stage in STAGES if "/" in stage}
    assert len(arrays["escapes"])
    moved_TLK = arrays["slots"] // recording.first_placement.slots_per_rank
    ranks = {
        (e, r) for e, r in zip(arrays["routing"][:, 0].flat, moved_TLK[:, 0].flat, strict=True)
    }
    assert len(ranks) > recording.model.num_experts


def test_recording_changes_no_token(rank_pool, recording):
    """Nor does company: some of the requests, all at once, on an engine that nobody watches."""
    config = config_of()
    some = frames(REQUESTS, NUM_TOKENS)[:8]
    parts = rank_pool.run(offline.generate, config.parallel.topology, config, some)
    unrecorded = {name: ids for part in parts for name, ids in part.items()}
    recorded: dict[str, list[int]] = {}
    for replica in range(2):
        names = [r.request_id for r in recording.requests if r.replica == replica]
        of_replica = recording.arrays["sampled"][recording.arrays["sampled"][:, 1] == replica]
        for seq_id, name in enumerate(names):
            recorded[name] = of_replica[of_replica[:, 2] == seq_id][:, 3].tolist()
    assert {name: recorded[name] for name in unrecorded} == unrecorded
    assert [len(ids) for ids in unrecorded.values()] == [NUM_TOKENS] * 8


# -- not the same -----------------------------------------------------------------------------------


def test_one_changed_choice_of_a_gate_is_found(recording):
    """Its step, layer and rank are named, by the slots and by the counters."""
    step, rank, layer = 20, 1, 3
    chunk = next(
        i
        for i, row in enumerate(recording.arrays["chunks"].tolist())
        if (row[0], row[2]) == (step, rank) and row[3]
    )
    token = int(recording.arrays["chunks"][:chunk, 3].sum())
    experts = recording.arrays["routing"][token, layer].tolist()
    other = next(e for e in range(32) if e not in experts)
    found = differences(altered(recording, "routing", (token, layer, 2), other))
    place = f"step {step}, layer {recording.model.moe_layers[layer]}, rank {rank}: "
    told = [line for line in found["slots"] if line.startswith(place)]
    assert len(told) == 1
    assert f"token 0 with experts {[*experts[:2], other, experts[3]]} went to slots" in told[0]
    look = f"step 23, layer {recording.model.moe_layers[layer]}, rank {rank}: "
    assert [line.startswith(look) for line in found["expert loads"][:2]] == [True, True]
    assert f"expert {other} was chosen" in " ".join(found["expert loads"][:2])
    assert "tokens of slots" in found


def test_whatever_else_is_changed_is_found(recording):
    arrays = recording.arrays
    sent = int(np.argmax(arrays["sent"][:, 0] == 30))
    _, layer, stage, source, destination, num_bytes = arrays["sent"][sent].tolist()
    link = f"step 30, layer {layer}, rank {source}: {STAGES[stage]} to rank {destination} had "
    slot = int(arrays["slot_tokens"][30, 1].argmax())
    count = int(arrays["slot_tokens"][30, 1, slot])
    cases = {
        ("slots", (5, 0, 0), (int(arrays["slots"][5, 0, 0]) + 1) % 36): ("slots", "layer 1, rank"),
        ("slot_tokens", (30, 1, slot), count + 1): (
            "tokens of slots",
            f"step 30, layer 2, rank {slot // 9}: slot {slot} had {count + 1} tokens, replay {count}",
        ),
        ("sent", (sent, 5), num_bytes + 4): (
            "bytes by link",
            f"{link}{num_bytes + 4} bytes, replay {num_bytes}",
        ),
        ("routed", (1, 2, 0, 7), 10_000): (
            "expert loads",
            "step 15, layer 1, rank 2: expert 7 was chosen 10000 times so far, replay",
        ),
    }
    for mutation, (name, message) in cases.items():
        found = differences(altered(recording, *mutation))
        assert list(found) == [name]
        assert len(found[name]) == 1
        assert message in found[name][0]


def test_other_batches_are_found(recording):
    """A sampled token that was another one is another batch in the next step."""
    found = differences(altered(recording, "sampled", (40, 3), 17))
    assert list(found) == ["batches"]
    assert found["batches"][0].startswith("step ")
    fewer = replace(recording, requests=recording.requests[:-1])
    assert list(differences(fewer)) == ["batches"]


def test_another_plan_is_found(recording):
    """The experts of two slots of different ranks change places: a row that nobody planned."""
    first, *others = recording.rebalances
    (layer, row), *rest = first.rows
    swapped = [row[9], *row[1:9], row[0], *row[10:]]
    mutant = replace(
        recording, rebalances=(first._replace(rows=[(layer, swapped), *rest]), *others)
    )
    found = differences(mutant)
    model_layer = recording.model.moe_layers[layer]
    assert found["placements"][0].startswith(
        f"rebalance after 2 looks: layer {model_layer} got slots {swapped}, replay {row}"
    )


def test_a_placement_that_came_in_force_a_step_later_is_found(recording):
    epochs = recording.arrays["epochs"].tolist()
    flip = next(i for i in range(len(epochs)) if epochs[i] > 0)
    found = differences(altered(recording, "epochs", (flip,), 0))
    step = int(recording.arrays["steps"][flip])
    assert found["slots"][0].startswith(f"step {step}, layer ")
    assert "placements" not in found


# -- recording --------------------------------------------------------------------------------------


def test_a_run_too_short_for_its_rebalances_is_an_error(rank_pool):
    with pytest.raises(RankError, match="the requests ended before look 50; give it more requests"):
        record(config_of(), arrivals(2, 4), looks_every=4, after_looks=[50], pool=rank_pool)


@pytest.mark.parametrize(("every", "after"), [(0, []), (4, [0]), (4, [3, 2])])
def test_looks_that_cannot_be(every, after):
    with pytest.raises(ValueError, match="need looks_every >= 1 and ascending after_looks >= 1"):
        record(config_of(), [], looks_every=every, after_looks=after)


def test_only_some_mismatches_are_told():
    found = Check(name="slots")
    for i in range(100):
        found.fail(f"number {i}", 2)
    assert found.num_wrong == 200
    assert len(found.wrong) == 20
