"""A rank dies or stops in each stage of a dispatch and combine: the others say so, and go on.

The victim's groups are wrapped: they count its operations, so that a fault can be put before the
n-th. A first run without a fault finds out how many there are, and what they are called.
"""

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from comms.dispatcher import TokenDispatcher
from comms.groups import CommError, CommTimeout, Group, ParallelGroups
from comms.launch import RankDied, RankPool
from comms.store import connect_store, host_store
from comms.topology import Topology
from tests.comms.cases import WAYS, expert, make, make_inputs

FOUR = Topology(num_nodes=2, ranks_per_node=2)
VICTIM, SURVIVORS = 3, (0, 1, 2)
SLOTS_PER_RANK, HIDDEN = 2, 24
DEADLINE_S = 0.6
LATEST_S = DEADLINE_S + 1.0  # after the call, on every survivor
STEP, LAYER = 5, 3
MOVES = ("all_gather", "reduce_scatter", "all_reduce", "all_to_all", "exchange", "start_exchange")


@dataclass
class Faulty:
    """A group that calls `before(stage)` before each of its moves."""

    group: Group
    before: Callable[[str], None]

    def __getattr__(self, name: str) -> Any:
        member = getattr(self.group, name)
        if name not in MOVES or self.group.size == 1:
            return member

        def call(*args: Any, **kwargs: Any) -> Any:
            exchange = name in ("exchange", "start_exchange")
            self.before([*args, *kwargs.values()][1] if exchange else name)
            return member(*args, **kwargs)

        return call


def with_fault(groups: ParallelGroups, before: Callable[[str], None]) -> ParallelGroups:
    names = ("world", "node", "rail", "tp")
    return replace(groups, **{name: Faulty(getattr(groups, name), before) for name in names})


def dispatcher_for(groups: ParallelGroups, way: str) -> TokenDispatcher:
    return make(groups, way, slots_per_rank=SLOTS_PER_RANK, hidden=HIDDEN)


def run_layer(dispatcher: TokenDispatcher, groups: ParallelGroups) -> torch.Tensor:
    """One dispatch, experts, combine."""
    topology = groups.topology
    inputs = make_inputs(
        topology, tokens=[6] * topology.world_size, slots_per_rank=SLOTS_PER_RANK, hidden=HIDDEN
    )
    mine = inputs[groups.rank]
    pending = dispatcher.start_dispatch(mine.x_TH, mine.slots_TK, mine.weights_TK)
    outputs = [expert(part, groups.rank, SLOTS_PER_RANK) for part in pending]
    return dispatcher.start_combine(outputs, pending.handle).wait()


def stages_of(groups: ParallelGroups, way: str) -> list[str]:
    """The moves of one layer, in the victim's order, as errors name them."""
    stages = []

    counted = with_fault(groups, stages.append)
    run_layer(dispatcher_for(counted, way), counted)
    return stages


def fail_in(groups: ParallelGroups, way: str, stage: int, address: str, number: signal.Signals):
    """The victim sends itself a signal in a stage; then all that live connect the next epoch.

    Returns the survivor's error, the seconds it took, and whether the next epoch works.
    """
    store, calls = connect_store(address), iter(range(1000))
    scope = f"{groups.epoch}/"

    def before(_: str) -> None:
        if groups.rank == VICTIM and next(calls) == stage:
            store.set(f"{scope}pid", str(os.getpid()))
            os.kill(os.getpid(), number)

    faulty = with_fault(groups, before)
    dispatcher = dispatcher_for(faulty, way)
    groups.where.step, groups.where.layer = STEP, LAYER
    groups.world.barrier()
    start, error = time.monotonic(), None
    try:
        while True:  # the last stage's victim is missed in the next layer
            run_layer(dispatcher, faulty)
    except CommError as raised:
        error, seconds = raised, time.monotonic() - start
    groups.abort()
    if groups.rank != VICTIM:
        store.set(f"{scope}done/{groups.rank}", "1")
    if groups.rank == 0:
        store.wait([f"{scope}done/{rank}" for rank in SURVIVORS])
        if number == signal.SIGSTOP:
            os.kill(int(store.get(f"{scope}pid")), signal.SIGCONT)
    groups.close()
    topology = FOUR if number == signal.SIGSTOP else Topology(num_nodes=1, ranks_per_node=3)
    after = ParallelGroups.connect(topology, groups.rank, store, epoch=groups.epoch + 1000)
    y_TH = run_layer(dispatcher_for(after, way), after)
    works = bool(y_TH.isfinite().all()) and bool(y_TH.any())
    after.world.barrier()
    after.close()
    return error, seconds, works


@pytest.fixture
def address():
    store, text = host_store()
    yield text
    del store


def check_survivors(answers: list[Any], stages: list[str]) -> None:
    for rank in SURVIVORS:
        error, seconds, works = answers[rank]
        assert f"rank {VICTIM}" in str(error)
        assert str(error).startswith(f"step {STEP}, layer {LAYER}, group ")
        assert any(f" in {stage}" in str(error) for stage in stages)
        assert seconds < LATEST_S
        assert works


@pytest.mark.parametrize("way", WAYS)
def test_a_rank_that_stops_is_named_and_can_come_back(rank_pool, address, way) -> None:
    stages = rank_pool.run(stages_of, FOUR, way)[VICTIM]
    assert stages
    for stage in range(len(stages)):
        answers = rank_pool.run(
            fail_in, FOUR, way, stage, address, signal.SIGSTOP, comm_timeout_s=DEADLINE_S
        )
        check_survivors(answers, stages)
        assert answers[VICTIM][2]
        timeouts = [answers[rank][0] for rank in SURVIVORS]
        timeouts = [error for error in timeouts if isinstance(error, CommTimeout)]
        assert any((e.operation, e.silent) == (stages[stage], (VICTIM,)) for e in timeouts)


@pytest.mark.parametrize("way", ["flat", "hierarchical", "low_latency"])
def test_a_rank_that_is_killed_is_named_and_the_others_go_on(address, way) -> None:
    with RankPool(4) as pool:
        stages = pool.run(stages_of, FOUR, way)[VICTIM]
        for stage in range(len(stages)):
            answers = pool.outcomes(
                fail_in, FOUR, way, stage, address, signal.SIGKILL, comm_timeout_s=DEADLINE_S
            )
            assert isinstance(answers[VICTIM], RankDied)
            check_survivors(answers, stages)
