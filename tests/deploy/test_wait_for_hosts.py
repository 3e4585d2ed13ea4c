"""A job that was submitted before all hosts have joined Ray waits for them, as long as it was told."""

import pytest

from cluster import controller
from cluster.config import ServeConfig
from cluster.controller import NotEnoughResourcesError
from deploy import job


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Hosts that each look at Ray finds; two are needed."""
    found = [1, 1, 2]

    def check(config: ServeConfig) -> None:
        if found.pop(0) < config.parallel.num_nodes:
            raise NotEnoughResourcesError("Ray has 1 host(s)")

    monkeypatch.setattr(controller, "check_resources", check)
    monkeypatch.setattr(job, "_HOSTS_POLL_S", 0.0)
    return found


def config(wait_s: float) -> ServeConfig:
    return ServeConfig.from_dict(
        {"model": "m", "parallel": {"num_nodes": 2}, "ray": {"wait_for_hosts_s": wait_s}}
    )


def test_hosts_that_join_later(looks: list[int]) -> None:
    job.wait_for_hosts(config(60.0))
    assert looks == []


def test_without_waiting_the_first_look_decides(looks: list[int]) -> None:
    with pytest.raises(NotEnoughResourcesError, match="1 host"):
        job.wait_for_hosts(config(0.0))
    assert looks == [1, 2]
