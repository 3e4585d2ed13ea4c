"""When the policy moves experts: not for noise, soon after a change, and only if it pays."""

import math

import numpy as np
import pytest
from scipy.optimize import linprog

from router.load import LoadWindow
from router.placement import Placement
from router.policy import Policy, PolicyOptions
from simulations.eplb import eplb
from simulations.workload import SHAPES, planned_loads, served_counts


def eplb_placement(load_LE, shape) -> Placement:
    return Placement(
        physical_to_logical=eplb(load_LE, shape.num_slots, 1, 1, shape.num_ranks),
        num_experts=shape.num_experts,
        num_ranks=shape.num_ranks,
    )


def batch(rng, load_LE, jitter, tokens):
    return np.stack([served_counts(rng, load_E, jitter, tokens) for load_E in load_LE])


def least_imbalance(row_S, load_E, num_ranks) -> float:
    """max/mean of the best division of load_E over the slots, by linear programming."""
    slots, per_rank = len(row_S), len(row_S) // num_ranks
    cost = np.r_[np.zeros(slots), 1]
    on_rank = np.zeros((num_ranks, slots + 1))
    on_rank[np.arange(slots) // per_rank, np.arange(slots)] = 1
    on_rank[:, slots] = -1
    of_expert = np.zeros((len(load_E), slots + 1))
    of_expert[row_S, np.arange(slots)] = 1
    solved = linprog(cost, on_rank, np.zeros(num_ranks), of_expert, load_E)
    return solved.x[-1] / load_E.sum() * num_ranks


@pytest.mark.parametrize("jitter", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("tokens", [1024, 6144, 65536])
def test_a_steady_load_never_moves_an_expert(tokens, jitter) -> None:
    """Whatever the noise: single batches are far above the threshold, decisions are not."""
    shape = SHAPES["A"]
    load_LE = planned_loads("A", "logn1", 3)
    placement = eplb_placement(load_LE, shape)
    window, rng = LoadWindow(3, shape.num_experts), np.random.default_rng(5)
    for _ in range(60):
        window.add(batch(rng, load_LE, jitter, tokens))
        assert not Policy().decide(window, placement).rebalance


@pytest.mark.parametrize("jitter", [0.0, 0.1, 0.3])
def test_another_load_is_acted_upon_within_batches(jitter) -> None:
    shape = SHAPES["A"]
    before_LE, after_LE = planned_loads("A", "logn1", 8)[:4], planned_loads("A", "logn1", 8)[4:]
    placement = eplb_placement(before_LE, shape)
    window, rng = LoadWindow(4, shape.num_experts), np.random.default_rng(6)
    for _ in range(30):
        window.add(batch(rng, before_LE, jitter, 6144))
    acted = []
    for step in range(1, 11):
        window.add(batch(rng, after_LE, jitter, 6144))
        if Policy().decide(window, placement).rebalance:
            acted.append(step)
    assert acted[0] in (2, 3)
    assert acted == list(range(acted[0], 11))


@pytest.mark.parametrize("batches", [2, 40])
def test_chance_is_that_of_drawing_tokens(batches) -> None:
    """In closed form: R ranks share N tokens, each Poisson; the largest of L * R normal errors."""
    window = LoadWindow(3, 8, horizon=1e12)
    for _ in range(batches):
        window.add(np.tile(np.arange(10, 90, 10), (3, 1)))
    decision = Policy().decide(window, Placement.contiguous(3, 8, 4))
    tokens = 360 * batches
    expected = math.sqrt(2 * math.log(3 * 4)) * math.sqrt(4 / tokens)
    assert decision.noise_L == pytest.approx(expected)
    # Contiguous: the last rank holds 70 + 80 of 360, its share 15/9 of the mean.
    assert decision.imbalance_L == pytest.approx(15 / 9)
    assert decision.rebalance is (15 / 9 - expected > 1.05)


def test_imbalance_is_the_least_that_splitting_gives() -> None:
    load_LE, other_LE = planned_loads("A", "logn1", 4)[:2], planned_loads("A", "logn1", 4)[2:]
    placement = eplb_placement(load_LE, SHAPES["A"])
    window = LoadWindow(2, 64)
    for _ in range(3):
        window.add(np.rint(other_LE / 1e3))
    decision = Policy().decide(window, placement)
    expected = [
        least_imbalance(row_S, load_E, 16)
        for row_S, load_E in zip(
            placement.physical_to_logical, np.rint(other_LE / 1e3), strict=True
        )
    ]
    assert decision.imbalance_L == pytest.approx(expected, rel=1e-6)
    assert decision.rebalance
    assert decision.layers == tuple(np.argsort(-np.array(expected)))
    assert f"{max(expected):.3f}" in decision.reason


def two_layers(excess: float) -> tuple[LoadWindow, Placement]:
    """Two ranks of one expert each: layer 1 has `excess` above the mean, nothing can be split."""
    window = LoadWindow(2, 2)
    counts_LE = np.array([[1.0, 1.0], [1 + excess, 1 - excess]]) * 1e9
    for _ in range(3):
        window.add(counts_LE)
    return window, Placement.contiguous(2, 2, 2)


@pytest.mark.parametrize(("excess", "expected"), [(0.01, False), (0.049, False), (0.051, True)])
def test_between_target_and_threshold_nothing_happens(excess, expected) -> None:
    decision = Policy().decide(*two_layers(excess))
    assert decision.rebalance is expected
    assert decision.layers == ((1,) if expected else ())
    assert decision.imbalance_L == pytest.approx([1, 1 + excess], abs=1e-6)
    assert ("above 1.050" if expected else "balanced: layer 1") in decision.reason


def test_a_gain_must_pay_for_its_bytes() -> None:
    """By hand: half of a 60 s horizon is one layer's straggling of 2, its share 1 - 1.02/1.2."""
    window, placement = two_layers(0.2)
    gain = 60 * 0.5 * (1 - 1.02 / 1.2) / 2
    # One expert to each of two ranks takes bytes / bandwidth seconds, 2 % of which are lost.
    seconds_even = gain / 0.02
    for bandwidth, expected in ((1e9, True), (1e9 / 1.01, True), (1e9 / 1.2, False)):
        options = PolicyOptions(
            bytes_per_expert=int(0.95 * seconds_even * 1e9), bandwidth=bandwidth
        )
        decision = Policy(options).decide(window, placement)
        assert decision.rebalance is expected
        if expected:
            assert decision.gain == pytest.approx(gain)
            assert decision.bytes == 2 * options.bytes_per_expert
        else:
            assert decision.reason.startswith("not worth it")
    policy = Policy(PolicyOptions(bytes_per_expert=10, bandwidth=5))
    assert policy.pays(1.2, 1.02, 2, 2, 2)
    assert not policy.pays(1.2, 1.2, 2, 2, 2)
    assert policy.pays(1.2, 1.02, int(2 * gain / 0.02) // 2 - 1, 2, 2)
    assert not policy.pays(1.2, 1.02, int(2 * gain / 0.02) // 2 + 1, 2, 2)


def test_speeds_count() -> None:
    """A rank of double speed that holds double the load is no imbalance."""
    window = LoadWindow(1, 2)
    for _ in range(3):
        window.add(np.array([[2e9, 1e9]]))
    placement = Placement.contiguous(1, 2, 2)
    assert Policy().decide(window, placement).rebalance
    fair = Policy(PolicyOptions(rank_speeds=(2.0, 1.0))).decide(window, placement)
    assert fair.imbalance_L == pytest.approx([1.0], abs=1e-4)


def test_one_batch_is_not_enough() -> None:
    window = LoadWindow(2, 2)
    assert Policy().decide(window, Placement.contiguous(2, 2, 2)).reason.startswith("0 batches")
    window.add(np.array([[1e9, 0], [1e9, 0]]))
    decision = Policy().decide(window, Placement.contiguous(2, 2, 2))
    assert not decision.rebalance
    assert "1 batches recorded" in decision.reason


def test_a_layer_without_tokens_is_balanced() -> None:
    window = LoadWindow(2, 2)
    for _ in range(3):
        window.add(np.array([[1e9, 1e9], [0, 0]]))
    decision = Policy().decide(window, Placement.contiguous(2, 2, 2))
    assert decision.imbalance_L == pytest.approx([1.0, 1.0])
    assert not decision.rebalance


def test_the_same_decision_again() -> None:
    first, second = (Policy().decide(*two_layers(0.3)) for _ in range(2))
    assert (first.layers, first.reason, first.gain) == (second.layers, second.reason, second.gain)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="2 layers of 2 experts, the placement 2 of 4"):
        Policy().decide(two_layers(0.1)[0], Placement.contiguous(2, 4, 2))
    for options in (
        {"target": 1.1},
        {"threshold": 0.9, "target": 0.9},
        {"bandwidth": 0},
        {"horizon_s": math.nan},
        {"slowdown": 2},
        {"bytes_per_expert": -1},
    ):
        with pytest.raises(ValueError, match="Invalid policy"):
            PolicyOptions(**options)
