"""Experts move while `mosaic` generates on 2 nodes x 2 ranks: the same tokens as without."""

import numpy as np
import pytest

from cluster import offline
from cluster.engine.mailbox import Frame
from cluster.scripted import Change
from comms.launch import RankPool
from comms.store import host_store
from router.placement import Placement, settle
from tests.engine.test_same_tokens import TIMEOUT_S, company, config_for, pick, serve, watched

NUM_LAYERS, NUM_EXPERTS, NUM_RANKS, REDUNDANT = 5, 32, 4, 8
NUM_TOKENS = 64


def random_changes(count: int, seed: int = 0) -> list[Change]:
    """New rows for one layer after the other: most experts move, copies of others appear."""
    rng = np.random.default_rng(seed)
    placement = Placement.contiguous(
        NUM_LAYERS, NUM_EXPERTS, NUM_RANKS, REDUNDANT, ranks_per_node=2
    )
    changes = []
    for number in range(count):
        layer = number % NUM_LAYERS
        spare = rng.choice(NUM_EXPERTS, REDUNDANT, replace=False)
        target = rng.permutation(np.concatenate([np.arange(NUM_EXPERTS), spare]))
        row = settle(placement.physical_to_logical[layer], target, placement.slots_per_rank)
        placement = placement.with_layers({layer: row})
        changes.append(Change(5 + 4 * number, layer, row.tolist()))
    return changes


def requests() -> list[Frame]:
    return [*company()[:3], *watched(NUM_TOKENS)]


@pytest.mark.timeout(TIMEOUT_S)
def test_tokens_are_those_of_a_static_run(rank_pool: RankPool) -> None:
    """Ring 2 in BF16: ten migrations while two watched requests and three others generate."""
    config = config_for(2, 2, experts={"num_redundant_experts": REDUNDANT})
    store, address = host_store()
    parts = rank_pool.run(
        offline.generate,
        config.parallel.topology,
        config,
        requests(),
        random_changes(10),
        address,
        timeout_s=TIMEOUT_S,
    )
    moving = {name: ids for part in parts for name, ids in part.items()}
    assert moving == serve(rank_pool, config, requests())
    assert [len(ids) for ids in pick(moving).values()] == [NUM_TOKENS] * 2
    del store
