"""A host's link goes down in each stage of a layer: every rank says so in time, and after the link is
mended the same processes go on.
"""

import subprocess
import time
from collections.abc import Iterator
from functools import partial

import pytest

from comms.groups import CommError, ParallelGroups
from comms.topology import Topology
from simulations.bench.hosted import HostedRanks
from simulations.testbed import INTERFACE, Testbed
from tests.comms.test_faults import (
    DEADLINE_S,
    LATEST_S,
    LAYER,
    STEP,
    dispatcher_for,
    run_layer,
    stages_of,
    with_fault,
)

TOPOLOGY = Topology(num_nodes=2, ranks_per_node=2)
CUTTING_RANK = 3  # on host 1


@pytest.fixture(scope="module")
def ranks() -> Iterator[HostedRanks]:
    if reason := Testbed.available():
        pytest.skip(reason)
    with Testbed(2, None) as testbed, HostedRanks(testbed, 2) as pool:
        yield pool


def cut_in(groups: ParallelGroups, way: str, stage: int) -> tuple[str, float]:
    """A rank takes its host's link down before its n-th move; the error and how long it took."""
    calls = iter(range(1000))

    def before(_: str) -> None:
        if groups.rank == CUTTING_RANK and next(calls) == stage:
            subprocess.run(["ip", "link", "set", INTERFACE, "down"], check=True)

    faulty = with_fault(groups, before)
    dispatcher = dispatcher_for(faulty, way)
    groups.where.step, groups.where.layer = STEP, LAYER
    groups.world.barrier()
    start = time.monotonic()
    try:
        while True:  # what the last stage misses, the next layer meets
            run_layer(dispatcher, faulty)
    except CommError as error:
        return str(error), time.monotonic() - start


def layer_works(groups: ParallelGroups, way: str) -> bool:
    y_TH = run_layer(dispatcher_for(groups, way), groups)
    return bool(y_TH.isfinite().all()) and bool(y_TH.any())


@pytest.mark.parametrize("way", ["hierarchical", "flat", "low_latency"])
def test_a_cut_link_is_reported_in_every_stage(ranks: HostedRanks, way: str) -> None:
    run = partial(ranks.run, comm_timeout_s=DEADLINE_S)
    stages = run(stages_of, TOPOLOGY, way)[CUTTING_RANK]
    for stage in range(len(stages)):
        for rank, (error, seconds) in enumerate(run(cut_in, TOPOLOGY, way, stage)):
            # The notes that name who started it are beyond the cut for host 1: there, a rank that
            # waited for its neighbour names the neighbour.
            others = {2, 3} if rank < 2 else {0, 1, 2, 3} - {rank}
            assert error.startswith(f"step {STEP}, layer {LAYER}, group ")
            assert any(f"for rank {other}" in error for other in others), error
            assert any(f" in {name}" in error for name in stages), error
            assert seconds < LATEST_S
        ranks.testbed.mend(1)
        assert all(ranks.run(layer_works, TOPOLOGY, way))
