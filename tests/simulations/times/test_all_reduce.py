"""The cost of an all-reduce, against the algorithms themselves run on small arrays."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from simulations.times.all_reduce import all_reduce_seconds
from simulations.times.network import Link

NODE = Link(alpha_s=10e-6, beta=200e9)
NETWORK = Link(alpha_s=30e-6, beta=45e9)
ranks = st.integers(1, 16)
sizes = st.floats(1, 1e9)


def seconds(size, ranks_per_node, num_nodes=1, **options):
    links = {"node": NODE, "network": NETWORK, **options}
    return float(
        all_reduce_seconds(size, ranks_per_node=ranks_per_node, num_nodes=num_nodes, **links)
    )


def run_ring(p: int) -> tuple[int, float]:
    """(rounds, parts of the message that a rank sends) of a ring that really adds."""
    data_RP = np.random.default_rng(p).integers(0, 100, (p, p))
    have_RP, rounds = data_RP.copy(), 0
    for shift, adds in [(s, True) for s in range(p - 1)] + [(s, False) for s in range(p - 1)]:
        before = have_RP.copy()
        for rank in range(p):
            part = (rank - shift if adds else rank + 1 - shift) % p
            to = (rank + 1) % p
            have_RP[to, part] = before[rank, part] + (have_RP[to, part] if adds else 0)
        rounds += 1
    assert (have_RP == data_RP.sum(axis=0)).all()
    return rounds, rounds / p


def run_doubling(p: int) -> tuple[int, float]:
    """The same of recursive doubling, for powers of two."""
    have_R, rounds = np.arange(p) ** 2, 0
    while 1 << rounds < p:
        have_R = have_R + have_R[np.arange(p) ^ (1 << rounds)]
        rounds += 1
    assert (have_R == sum(rank**2 for rank in range(p))).all()
    return rounds, float(rounds)


@pytest.mark.parametrize("p", [2, 3, 4, 8, 16])
def test_ring_takes_what_running_it_takes(p: int) -> None:
    rounds, parts = run_ring(p)
    expected = rounds * NODE.alpha_s + parts * 1e6 / NODE.beta
    assert seconds(1e6, p, algorithm="ring") == pytest.approx(expected)


@pytest.mark.parametrize("p", [2, 4, 8, 16])
def test_the_best_is_one_shot_or_two_and_doubling_no_better(p: int) -> None:
    rounds, parts = run_doubling(p)
    for size in np.geomspace(1, 1e9, 40):
        message = size / NODE.beta
        one_shot = NODE.alpha_s + (p - 1) * message
        two_shots = 2 * (NODE.alpha_s + (p - 1) / p * message)
        doubling = rounds * NODE.alpha_s + parts * message
        assert seconds(size, p) == pytest.approx(min(one_shot, two_shots))
        assert seconds(size, p) <= doubling * (1 + 1e-12)


def test_small_messages_go_in_one_shot_and_large_ones_in_two() -> None:
    assert seconds(1, 8) == pytest.approx(NODE.alpha_s, rel=1e-5)
    assert seconds(1e9, 8) == pytest.approx(2 * 7 / 8 * 1e9 / NODE.beta, rel=0.01)


def test_one_rank_has_nothing_to_reduce() -> None:
    assert seconds(1e9, 1) == 0.0


@pytest.mark.parametrize("p", [2, 8])
@pytest.mark.parametrize("g", [2, 4])
def test_over_nodes_each_rank_sends_its_part(p: int, g: int) -> None:
    size = 3e6
    inside = 2 * (NODE.alpha_s + size * (p - 1) / p / NODE.beta)
    part = size / p / NETWORK.beta
    one = NETWORK.alpha_s + (g - 1) * part
    two = 2 * NETWORK.alpha_s + 2 * (g - 1) / g * part
    assert seconds(size, p, g) == pytest.approx(inside + min(one, two))
    assert seconds(size, 1, g) == seconds(size, g, node=NETWORK)


def test_without_limits_of_bandwidth_only_rounds_count() -> None:
    fast = {"node": Link(alpha_s=1e-6, beta=1e30), "network": Link(alpha_s=5e-6, beta=1e30)}
    assert seconds(1e9, 8, **fast) == pytest.approx(1e-6)
    assert seconds(1e9, 8, 4, **fast) == pytest.approx(2e-6 + 5e-6)
    assert seconds(1e9, 8, algorithm="ring", **fast) == pytest.approx(14e-6)


@given(size=sizes, p=ranks, g=st.integers(1, 8))
def test_no_algorithm_beats_the_bound_nor_the_ring_the_best(size: float, p: int, g: int) -> None:
    best = seconds(size, p, g)
    assert best <= seconds(size, p, g, algorithm="ring") * (1 + 1e-12)
    if g == 1 and p > 1:
        assert best >= NODE.alpha_s + 2 * (p - 1) / p * size / NODE.beta * (1 - 1e-12) or (
            p == 2 and best >= NODE.alpha_s + size / NODE.beta * (1 - 1e-12)
        )


@given(small=sizes, factor=st.floats(1, 100), p=ranks, g=st.integers(1, 8))
def test_more_bytes_are_never_faster(small: float, factor: float, p: int, g: int) -> None:
    assert seconds(small, p, g) <= seconds(small * factor, p, g) * (1 + 1e-12)


def test_all_sizes_at_once_are_each_size_alone() -> None:
    many = np.geomspace(1e2, 1e9, 7)
    together = all_reduce_seconds(many, ranks_per_node=8, num_nodes=2, node=NODE, network=NETWORK)
    assert together.tolist() == [seconds(size, 8, 2) for size in many]
    assert all(a <= b for a, b in pairwise(together))


def test_no_ranks_are_refused() -> None:
    with pytest.raises(ValueError, match="num_nodes=0"):
        seconds(1, 8, 0)
