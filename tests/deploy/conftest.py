"""One served cluster for all tests that talk to it as a client would."""

import signal
from collections.abc import Iterator

import pytest

from tests.deploy.processes import EXPERTMESH, Command, running

START_TIMEOUT_S = 120
OPTIONS = (
    "scheduler.max_num_queued_reqs=64",
    "experts.num_redundant_experts=8",
    "eplb_config.interval_s=0.25",
    "eplb_config.min_tokens=16",
    "server.http_port=0",
)


@pytest.fixture(scope="session", autouse=True)
def _ctrl_c_reaches_our_commands() -> None:
    """A shell lets what it runs in the background ignore Ctrl-C, and children inherit that."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def served() -> Iterator[Command]:
    """`expertmesh serve` with the demo's configuration: 2 logical nodes x 2 ranks, BF16, mosaic."""
    with running([EXPERTMESH, "serve", *OPTIONS]) as command:
        command.wait_for(r"serving mosaic on (\S+)", START_TIMEOUT_S)
        yield command


@pytest.fixture
def endpoint(served: Command) -> str:
    return served.wait_for(r"serving mosaic on (\S+)", 1)[1]
