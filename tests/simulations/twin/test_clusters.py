"""Twins of other clusters: every rule of choice among copies, dispatchers, formats, micro-batches."""

from dataclasses import replace

import pytest

from comms.groups import ParallelGroups
from comms.links import LinkSpeed
from comms.store import host_store
from simulations.twin.noted import Arrival
from simulations.twin.rank_recorder import RankNotes
from simulations.twin.record import assemble, record, record_rank
from simulations.twin.recording import Recording
from simulations.twin.replay import check
from tests.simulations.twin.runs import arrivals, config_of, frames


def differences(recording: Recording) -> list[str]:
    return [line for found in check(recording) for line in found.wrong]


def with_slow_links(groups: ParallelGroups, *args) -> RankNotes:
    """Links that are said to be so slow that steps run in two micro-batches."""
    return record_rank(replace(groups, links=LinkSpeed(latency_s=0.1, bytes_per_s=1e6)), *args)


def test_micro_batches_are_replayed(rank_pool):
    config = config_of(scheduler={"max_num_seqs": 8, "max_num_batched_tokens": 64})
    store, address = host_store()
    at_once = [Arrival(0, frame) for frame in frames(10, 6)]
    args = (config, at_once, 4, [], address)
    notes = rank_pool.run(with_slow_links, config.parallel.topology, *args)
    del store
    recording = assemble(config, notes, 4)
    assert recording.arrays["chunks"][:, 1].max() == 1
    assert differences(recording) == []
    unhurried = replace(recording, links=None)
    assert differences(unhurried)[0] == "step 0: ran in 2 micro-batches, replay 1"


@pytest.mark.parametrize(
    "sections",
    [
        pytest.param(
            {"experts": {"num_redundant_experts": 4, "split": "auto"}}, id="recent counts"
        ),
        pytest.param(
            {
                "experts": {"num_redundant_experts": 4, "split": "nodes"},
                "parallel": {"num_nodes": 2, "ranks_per_node": 2, "tensor_parallel_size": 1},
            },
            id="nodes",
        ),
        pytest.param(
            {
                "comms": {"all2all_backend": "flat", "combine": "exact"},
                "experts": {"num_redundant_experts": 4, "split": "activated"},
            },
            id="flat, exact, activated",
        ),
        pytest.param(
            {
                "comms": {
                    "combine": "node",
                    "dispatch_dtype": "float8",
                    "combine_dtype": "logfmt10",
                },
                "experts": {"num_redundant_experts": 4, "split": "static"},
            },
            id="fp8, static",
        ),
    ],
)
def test_other_clusters(rank_pool, sections):
    recording = record(
        config_of(**sections), arrivals(8, 8), looks_every=4, after_looks=[1], pool=rank_pool
    )
    assert len(recording.rebalances[0].rows) >= 1
    assert differences(recording) == []
