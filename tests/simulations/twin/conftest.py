"""One run of a real cluster, recorded once for all that look at it."""

import pytest

from comms.launch import RankPool
from simulations.twin.record import record
from simulations.twin.recording import Recording
from tests.simulations.twin.runs import NUM_TOKENS, REQUESTS, arrivals, config_of


@pytest.fixture(scope="session")
def recording(rank_pool: RankPool) -> Recording:
    """2 x 2 ranks, a cache too small for all, and two rebalances while the subject changes."""
    config = config_of(cache={"block_size": 16, "num_blocks": 6})
    requests = arrivals(REQUESTS, NUM_TOKENS)
    return record(config, requests, looks_every=8, after_looks=[2, 6], pool=rank_pool)
