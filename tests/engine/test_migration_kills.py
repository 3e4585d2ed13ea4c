"""kill -9 on one of four ranks amid migrations: the survivors stand at one epoch, and hold it.
SIGSTOP on a holder: it is given up, and nothing of the attempt stays.

The engine's own leaders, followers and migrators on real processes; the model is a barrier. A flip
means that every rank was prepared: so survivors that missed it can follow, once they have compared.
"""

import os
import signal
import threading
import time
from typing import Any

import numpy as np
import torch

from cluster.engine.engine import Follower, Leader, Verdict
from cluster.engine.mailbox import LocalMailbox
from cluster.engine.plan import StepPlan
from cluster.engine.sampling_params import SamplingParams
from cluster.offline import add_frame
from cluster.scripted import Change, Script
from comms.group import CommError
from comms.groups import ParallelGroups
from comms.launch import RankDied, RankPool
from comms.store import connect_store, host_store
from router.placement import Placement
from tests.engine.model_free import FOUR, ModelFreeRunner, build_runner, leader_of
from tests.experts.migrating import (
    EXPERT_BYTES,
    FINGERPRINTS_LE,
    NUM_LAYERS,
    first_placement,
    left_over,
    random_row,
)

NUM_CHANGES = 60
KILL_POINTS = [
    ("time", 1), ("time", 2), ("time", 3),
    ("serving", 0), ("serving", 3),
    ("agreed", 0), ("agreed", 2),
    ("flip", 0), ("flip", 1), ("flip", 3),
]  # fmt: skip


def script(seed: int) -> tuple[list[Change], list[Placement]]:
    """Changes as fast as they go, and the placement after each number of them."""
    rng, placements, changes = np.random.default_rng(seed), [first_placement()], []
    for number in range(NUM_CHANGES):
        layer = number % NUM_LAYERS
        row = random_row(placements[-1], layer, rng)
        changes.append(Change(0, layer, row))
        placements.append(placements[-1].with_layers({layer: row}))
    return changes, placements


def start(groups: ParallelGroups) -> None:
    """New processes have imported all they need when they answer."""


def serve_until_killed(
    groups: ParallelGroups, kind: str, victim: int, at_epoch: int, address: str
) -> tuple[int, bool]:
    """A survivor's epoch in the end, and whether its slots hold what the map of that epoch says."""
    changes, placements = script(seed=victim)
    is_victim, is_leader = groups.rank == victim, groups.topology.tp_rank_of(groups.rank) == 0

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def on_read() -> None:
        if is_victim and kind == "serving" and runner.epoch >= at_epoch:
            die()

    runner, layers = build_runner(groups, on_read)
    params = SamplingParams(temperature=0.0, max_tokens=9000, ignore_eos=True)
    mailbox = LocalMailbox([add_frame(f"r{groups.rank}", [1, 2], params)]) if is_leader else None
    engine = leader_of(groups, runner, mailbox) if mailbox else Follower(groups, runner)
    if is_victim:
        arm(engine, runner, kind, at_epoch, die)
    store, scope = connect_store(address), f"{groups.epoch}/in-force"
    with Script(changes, runner, mailbox, groups, address):
        try:
            while engine.step():
                pass
        except CommError:
            groups.abort()
        # What a recovery does: compare, and follow whoever has gone on.
        store.set(f"{scope}/{groups.rank}", str(runner.epoch))
        survivors = [f"{scope}/{rank}" for rank in range(4) if rank != victim]
        store.wait(survivors)
        runner.flip(max(int(store.get(key)) for key in survivors))
    runner.close()
    mine = runner.migrator.placement
    good = np.array_equal(mine.physical_to_logical, placements[mine.epoch].physical_to_logical)
    for idx, layer in enumerate(layers):
        for slot, number in mine.experts_of_rank(idx, groups.rank).items():
            good &= layer.slots[slot].fingerprint() == int(FINGERPRINTS_LE[idx, number])
    return mine.epoch, good


def arm(
    engine: Leader | Follower, runner: ModelFreeRunner, kind: str, at_epoch: int, die: Any
) -> None:
    """time: somewhen after that epoch. agreed: leaders have agreed on the next one, and nobody else
    knows. flip: just before its own."""
    flip = runner.flip

    def dying_flip(epoch: int) -> None:
        if epoch > at_epoch:
            die()
        flip(epoch)

    def later() -> None:
        while runner.epoch < at_epoch:
            time.sleep(0.001)
        time.sleep(np.random.default_rng(at_epoch).uniform(0, 0.02))
        die()

    if kind == "time":
        threading.Thread(target=later, daemon=True).start()
    elif kind == "flip":
        runner.flip = dying_flip
    elif kind == "agreed":
        assert isinstance(engine, Leader)
        agree = engine._agree

        def dying_agree(plan: StepPlan) -> Verdict:
            verdict = agree(plan)
            if verdict.epoch > at_epoch:
                die()
            return verdict

        engine._agree = dying_agree


def test_survivors_of_a_kill_stand_at_one_epoch() -> None:
    store, address = host_store()
    epochs = []
    with RankPool(4) as pool:
        for number, (kind, victim) in enumerate(KILL_POINTS):
            pool.run(start, FOUR)  # what takes long, so that deadlines can be short
            outcomes = pool.outcomes(
                serve_until_killed, FOUR, kind, victim, 1 + number % 5, address, comm_timeout_s=2.0
            )
            assert isinstance(outcomes.pop(victim), RankDied)
            assert {good for _, good in outcomes} == {True}, (kind, victim, outcomes)
            assert len({epoch for epoch, _ in outcomes}) == 1, (kind, victim, outcomes)
            epochs.append(outcomes[0][0])
    assert all(0 < epoch < NUM_CHANGES for epoch in epochs), epochs
    del store


def fetch_from_a_stopped_rank(groups: ParallelGroups) -> tuple[dict[str, Any], bool, bool] | None:
    """Rank 0 wants expert 8 of rank 3, which stops as it is asked for it.

    Rank 0's metrics then, whether all is as before once it abandons, and whether it works after
    rank 3 goes on.
    """

    once = iter([groups.rank == 3])

    def on_read() -> None:
        if next(once, False):
            signal.raise_signal(signal.SIGSTOP)  # this thread at once, and so all

    runner, _ = build_runner(groups, on_read)
    pids = groups.world.all_gather(torch.tensor([os.getpid()]), [1] * 4)
    report = None
    if groups.rank == 0:
        row = first_placement().physical_to_logical[0].tolist()
        row[0] = 8
        before = left_over()
        runner.prepare(1, 0, row)
        metrics = runner.migrator.metrics()
        runner.abandon(1)
        after = left_over()
        os.kill(int(pids[3]), signal.SIGCONT)
        runner.prepare(1, 0, row)
        runner.flip(1)
        report = metrics, after == before, runner.epoch == 1
    groups.world.barrier()
    runner.close()
    return report


def test_a_stopped_holder_is_given_up(rank_pool) -> None:
    (metrics, clean, works), *_ = rank_pool.run(fetch_from_a_stopped_rank, FOUR)
    assert metrics["bytes"] == {"node": 0, "remote": 0, "disk": EXPERT_BYTES}
    assert metrics["retries"] == 1
    assert clean
    assert works
