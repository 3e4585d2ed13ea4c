"""Fixtures of the whole test suite."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from comms.launch import RankPool
from tests.checkpoints import write_checkpoint


@pytest.fixture(scope="session")
def rank_pool() -> Iterator[RankPool]:
    """Rank processes shared by all tests; grows on demand."""
    with RankPool(6) as pool:
        yield pool


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The directory of a tiny random checkpoint by its name in `tests.checkpoints.SPECS`."""
    written: dict[str, Path] = {}

    def directory(name: str) -> Path:
        if name not in written:
            written[name] = write_checkpoint(name, tmp_path_factory.mktemp("checkpoints") / name)
        return written[name]

    return directory
