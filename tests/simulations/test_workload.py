"""The seeded loads, and EPLB on them: figures of an independent measurement, to be met again."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simulations.eplb import eplb, even_rank_loads
from simulations.workload import (
    SHAPES,
    WORKLOADS,
    drifting_loads,
    planned_loads,
    served_counts,
)

# max/mean and (max - min)/mean over ranks, averaged over 58 layers, as measured with EPLB itself.
MEASURED = {
    "zipf0.6": [(1.006, 0.010), (1.070, 0.121), (1.373, 0.619), (1.007, 0.010), (1.004, 0.007)],
    "zipf1.0": [(1.028, 0.039), (1.435, 0.620), (2.608, 2.130), (1.026, 0.048), (1.013, 0.018)],
    "zipf1.4": [(1.068, 0.106), (2.598, 2.030), (5.104, 4.870), (1.237, 0.334), (1.263, 0.370)],
    "logn1": [(1.015, 0.032), (1.071, 0.128), (1.378, 0.659), (1.017, 0.040), (1.015, 0.034)],
    "burst": [(1.010, 0.037), (1.436, 0.569), (2.165, 1.360), (1.011, 0.052), (1.010, 0.045)],
    "two_topic": [(1.016, 0.036), (1.078, 0.140), (1.401, 0.690), (1.016, 0.040), (1.014, 0.035)],
    "uniform": [(1.001, 0.002), (1.001, 0.004), (1.007, 0.016), (1.001, 0.005), (1.001, 0.003)],
}


def plan(load_LE, shape):
    return eplb(load_LE, shape.num_slots, shape.num_groups, shape.num_nodes, shape.num_ranks)


@pytest.mark.parametrize("workload", WORKLOADS)
def test_eplb_meets_the_measured_figures(workload: str) -> None:
    for (name, shape), (imbalance, difference) in zip(
        SHAPES.items(), MEASURED[workload], strict=True
    ):
        load_LE = planned_loads(name, workload)
        rank_LR = even_rank_loads(plan(load_LE, shape), load_LE, shape.num_ranks)
        mean_L = rank_LR.mean(axis=1)
        assert np.allclose(mean_L, load_LE.sum(axis=1) / shape.num_ranks)
        assert (rank_LR.max(axis=1) / mean_L).mean() == pytest.approx(imbalance, abs=0.01)
        assert (np.ptp(rank_LR, axis=1) / mean_L).mean() == pytest.approx(difference, abs=0.01)


@given(
    layers=st.integers(1, 3),
    nodes=st.integers(1, 3),
    ranks_per_node=st.integers(1, 3),
    slots_per_rank=st.integers(1, 4),
    groups=st.integers(1, 6),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_eplb_gives_every_expert_a_copy_in_its_groups_node(
    layers, nodes, ranks_per_node, slots_per_rank, groups, data
) -> None:
    num_ranks = nodes * ranks_per_node
    num_slots = num_ranks * slots_per_rank
    group_size = data.draw(st.integers(1, max(1, num_slots // groups)))
    experts = groups * group_size
    if experts > num_slots:
        return
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    rows = eplb(rng.random((layers, experts)), num_slots, groups, nodes, num_ranks)
    assert rows.shape == (layers, num_slots)
    for row in rows:
        assert set(row.tolist()) == set(range(experts))
        if groups % nodes == 0:
            by_node = [set((part // group_size).tolist()) for part in row.reshape(nodes, -1)]
            assert sum(len(part) for part in by_node) == groups


def test_eplb_refuses_a_fraction_of_a_slot() -> None:
    with pytest.raises(ValueError, match="288 slots, 64 ranks"):
        eplb(np.ones((1, 256)), 288, 8, 8, 64)


def test_fewer_layers_are_the_first_layers() -> None:
    assert np.array_equal(planned_loads("C", "burst")[:3], planned_loads("C", "burst", 3))
    burst_LE = planned_loads("C", "burst", 5)
    assert np.allclose(burst_LE.max(axis=1) / burst_LE.sum(axis=1), 0.125)


def test_served_counts_are_the_load_with_noise() -> None:
    rng = np.random.default_rng(0)
    load_E = planned_loads("A", "logn1", 1)[0]
    counts_ME = np.stack([served_counts(rng, load_E, 0.0, 65536) for _ in range(50)])
    assert (counts_ME.sum(axis=1) == 65536).all()
    expected_E = 65536 * load_E / load_E.sum()
    # Fifty batches: five standard errors of a Poisson mean.
    assert (abs(counts_ME.mean(axis=0) - expected_E) < 5 * np.sqrt(expected_E / 50)).all()


@pytest.mark.parametrize("rho", [0.5, 0.99])
def test_drift_is_ar1_with_unit_deviation(rho: float) -> None:
    steps = drifting_loads(rho, 20, 256)
    first, second = (np.log(next(steps) / 1e6).ravel() for _ in range(2))
    assert second.std() == pytest.approx(1.0, abs=0.05)
    assert np.corrcoef(first, second)[0, 1] == pytest.approx(rho, abs=0.05)
