"""A short storm on a real cluster; `expertmesh bench storm` makes long ones."""

import asyncio
import re
from urllib.parse import urlsplit

from cluster.server.client import Client
from deploy.bench.storm.kinds import KINDS, Target
from deploy.bench.storm.run import storm

REQUESTS = 120


def test_a_storm_leaves_nothing_behind_and_disturbs_nobody(served, endpoint):
    url = urlsplit(served.wait_for(r"over HTTP on (\S+)", 10)[1])
    with Client(endpoint) as client:
        target = Target(endpoint, (url.hostname, url.port), client.model_info().vocab_size)
    outcome = asyncio.run(storm(target, REQUESTS, concurrency=16, seed=1))
    assert outcome.complaints == {}
    assert outcome.num_requests == REQUESTS
    assert outcome.settled_s is not None
    assert outcome.num_sentinels >= 3
    assert len(outcome.ended) > len(KINDS) / 2
    assert not re.search("Traceback|internal error", served.output)
