"""Links against a line, exchanges against plain loops."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from simulations.times.network import Link, exchange_seconds

SIZES = st.lists(st.integers(0, 10**12), min_size=1, max_size=8)


def test_alpha_and_beta():
    link = Link(alpha_s=1e-5, beta=5e10)
    assert link.seconds(5e10) == pytest.approx(1.00001)
    assert link.seconds([0, 1e6]).tolist() == pytest.approx([0, 3e-5])
    assert link.seconds(0, always=True) == pytest.approx(1e-5)


@given(SIZES, SIZES)
def test_the_busiest_rank_and_its_busier_direction(sent, received):
    ranks = min(len(sent), len(received))
    link = Link(alpha_s=2e-6, beta=1e9)
    slowest = 0.0
    for out, into in zip(sent[:ranks], received[:ranks], strict=True):
        if out or into:
            slowest = max(slowest, 2e-6 + max(out, into) / 1e9)
    found = exchange_seconds(np.array(sent[:ranks]), np.array(received[:ranks]), link)
    assert found == pytest.approx(slowest)


def test_many_exchanges_at_once():
    rng = np.random.default_rng(1)
    sent, received = rng.integers(0, 9, (2, 3, 4, 5)) * 1000
    link = Link(alpha_s=1e-6, beta=1e9)
    found = exchange_seconds(sent, received, link)
    assert found.shape == (3, 4)
    assert found[1, 2] == exchange_seconds(sent[1, 2], received[1, 2], link)


@pytest.mark.parametrize("numbers", [(-1e-6, 1e9), (0.0, 0.0), (float("nan"), 1e9), (0.0, -1.0)])
def test_links_that_cannot_be(numbers):
    with pytest.raises(ValueError, match="alpha_s >= 0 and beta > 0"):
        Link(alpha_s=numbers[0], beta=numbers[1])
