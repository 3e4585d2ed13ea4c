"""Fixtures of the whole test suite."""

from collections.abc import Iterator

import pytest

from comms.launch import RankPool


@pytest.fixture(scope="session")
def rank_pool() -> Iterator[RankPool]:
    """Rank processes shared by all tests; grows on demand."""
    with RankPool(6) as pool:
        yield pool
