"""The deploy job, submitted to a Ray cluster the way its users submit it."""

import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.server.client import Client
from tests.deploy.processes import running

RAY = str(Path(sys.executable).with_name("ray"))


@pytest.fixture(scope="module")
def ray_head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A Ray head node with its dashboard on loopback; yields the environment to reach it."""
    directory = tmp_path_factory.mktemp("r")
    environment = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    command = [
        RAY, "start", "--head", "--block", "--node-ip-address=127.0.0.1", "--port=0",
        "--num-cpus=4", "--dashboard-host=127.0.0.1", "--dashboard-port=0",
        "--dashboard-agent-listen-port=0",  # the usual one may be that of another Ray here
        "--disable-usage-stats", f"--temp-dir={directory}",
    ]  # fmt: skip
    with running(command, **environment) as head:
        address = head.wait_for(r"RAY_API_SERVER_ADDRESS='(http://\S+)'", 150)[1]
        yield {**environment, "RAY_ADDRESS": address}


def test_job_submitted_with_ray_serves_until_stopped(ray_head: dict[str, str]) -> None:
    arguments = [
        RAY, "job", "submit", "--submission-id", "serve", "--working-dir", ".", "--",
        sys.executable, "-m", "deploy.job", "--config", "deploy/configs/demo.yaml",
    ]  # fmt: skip
    with running(arguments, **ray_head) as job:
        endpoint = job.wait_for(r"serving mosaic on (\S+)", 150)[1]
        with Client(endpoint) as client:
            client.wait_ready(30)
            answer = client.generate("The whale", max_tokens=8, temperature=0.0)
        assert answer.usage.completion_tokens == 8
        expect_no_room_for_a_second_cluster(ray_head)
        subprocess.run(
            [RAY, "job", "stop", "serve"], env={**os.environ, **ray_head}, check=True,
            capture_output=True, timeout=90,
        )  # fmt: skip
        job.wait_for("(?i)stopped", 60)


def expect_no_room_for_a_second_cluster(ray_head: dict[str, str]) -> None:
    """Enough CPUs in all, but the first cluster holds them."""
    arguments = [
        RAY, "job", "submit", "--working-dir", ".", "--",
        sys.executable, "-m", "deploy.job", "--config", "deploy/configs/demo.yaml",
    ]  # fmt: skip
    with running(arguments, **ray_head) as job:
        job.wait_for(r"= 4 CPUs .* 0 of them free", 60)
        assert job.wait(60) != 0


def test_layout_larger_than_the_cluster_is_refused_at_once(ray_head: dict[str, str]) -> None:
    arguments = [
        RAY, "job", "submit", "--working-dir", ".", "--",
        sys.executable, "-m", "deploy.job", "--config", "deploy/configs/demo.yaml",
        "parallel.num_nodes=8",
    ]  # fmt: skip
    with running(arguments, **ray_head) as job:
        job.wait_for(r"needs 8 nodes x 2 ranks .* = 16 CPUs", 60)
        assert job.wait(60) != 0
