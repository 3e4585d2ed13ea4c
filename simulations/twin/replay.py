"""The twin check: does the simulation arrive at exactly what the real cluster did?

A recording says what the gates chose, which requests came, and after which looks a rebalance was asked
for. From that alone the production router, scheduler and planner, and `traffic.py`, must find what
else was recorded: batches, expert loads, placements, the slot of every token, what every slot had to
compute, and the bytes on every link. Not one number may differ.
"""

from __future__ import annotations

from router.load import LoadFileError
from simulations.twin.batches import check_batches, steps_of
from simulations.twin.check import Check
from simulations.twin.placements import check_loads, check_placements
from simulations.twin.recording import Recording
from simulations.twin.replay_batches import recorded_plans
from simulations.twin.replay_choices import replay_choices
from simulations.twin.tokens import check_bytes, check_slot_tokens, check_slots


def check(recording: Recording) -> list[Check]:
    """All checks. Raises LoadFileError for a recording that is none of a run."""
    try:
        plans = list(recorded_plans(recording))
    except ValueError as error:
        raise LoadFileError(f"array 'plans': {error}") from error
    batches = check_batches(recording, plans)
    if batches.num_wrong:
        return [batches]  # who owns which token is not known
    steps = list(steps_of(recording, plans))
    choices = replay_choices(recording, steps)
    for step, wanted in zip(steps, choices.micro_batches, strict=True):
        if len(step.tokens) != wanted:
            batches.fail(
                f"step {step.number}: ran in {len(step.tokens)} micro-batches, replay {wanted}"
            )
    return [
        batches,
        check_loads(recording),
        check_placements(recording),
        check_slots(recording, steps, choices),
        check_slot_tokens(recording, steps, choices),
        check_bytes(recording, steps, choices),
    ]
