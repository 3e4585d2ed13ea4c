"""Curves over all batches: where they end, and single points against the cost model itself."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from comms.topology import Topology
from simulations.balance.load_shares import Workload
from simulations.claims.parallel_curves import (
    STEPS,
    ExpertParallel,
    batches_up_to,
    most_that_fits,
    tensor_parallel_curve,
)
from simulations.claims.tensor_parallel import TensorParallel
from simulations.cost import CostModel, StepWork
from simulations.deployment import Deployment
from simulations.hardware.calibration import Calibration
from simulations.memory import DoesNotFit, rank_memory
from simulations.presets import load_model

MOSAIC = load_model("mosaic")
H100 = replace(Calibration.named("h100-published"), supports_two_batch=False)
CLUSTER = Deployment(
    model=MOSAIC,
    topology=Topology(num_nodes=2, ranks_per_node=2, tensor_parallel_size=1),
    num_redundant_experts=4,
)
CONTEXT = 256


def room_for(tokens: int, deployment: Deployment) -> Calibration:
    """Memory for so many sequences of the rank, and half of one more."""
    kv = deployment.kv_bytes_per_token * CONTEXT

    def fits(memory: float, number: int) -> bool:
        try:
            rank_memory(
                deployment,
                replace(H100, memory_bytes=memory),
                max_tokens=number,
                kv_tokens=number * CONTEXT,
            )
        except DoesNotFit:
            return False
        return True

    memory = 0.0
    while not fits(memory, tokens):
        memory += kv / 2
    return replace(H100, memory_bytes=memory)


@given(st.integers(1, 5000))
def test_the_most_that_fits_is_found(most: int) -> None:
    def fits(number: int) -> None:
        if number > most:
            raise DoesNotFit(str(number))

    assert most_that_fits(fits) == most


def test_what_does_not_fit_at_all_says_so() -> None:
    def fits(number: int) -> None:
        raise DoesNotFit(f"{number} too many")

    with pytest.raises(DoesNotFit, match="1 too many"):
        most_that_fits(fits)


@given(st.integers(1, 100_000))
def test_batches_go_from_one_to_the_most_by_half_octaves(most: int) -> None:
    batches = np.array(batches_up_to(most))
    assert (batches[0], batches[-1]) == (1, most)
    assert (np.diff(batches) > 0).all()
    assert (batches[1:] <= np.ceil(np.sqrt(2) * batches[:-1]) + 1).all()
    assert len(batches) <= 2 * np.log2(most) + 2


def test_expert_parallel_ends_where_memory_does_and_grows() -> None:
    calibration = room_for(11, CLUSTER)
    curve = ExpertParallel(CLUSTER, Workload(), 0).curve(calibration, CONTEXT)
    assert curve.tokens_per_rank.tolist() == [1, 2, 3, 4, 6, 8, 11]
    assert (np.diff(curve.tpot_s) >= 0).all()


def test_a_point_is_a_step_of_evenly_divided_tokens() -> None:
    """Four ranks, 8 sequences each, 4 experts a token: 32 pairs a rank in the mean."""
    experts = ExpertParallel(CLUSTER, Workload(name="uniform", jitter=0.0), 0)
    slot_BLS, sends = experts._of_batch(8)
    assert slot_BLS.shape == (STEPS, 5, 36)
    rank_BLR = slot_BLS.reshape(STEPS, 5, 4, 9).sum(axis=3)
    assert (rank_BLR.sum(axis=2) == 4 * 8 * 4).all()
    assert 32 <= rank_BLR.max(axis=2).mean() < 36
    curve = experts.curve(room_for(8, CLUSTER), CONTEXT)
    times = CostModel(CLUSTER, H100).step(
        StepWork.decode(np.array([[8.0]]), CONTEXT), slot_BLS, sends
    )
    assert curve.tpot_s[-1] == pytest.approx(times.total_B.mean())
    assert 0 < sends.nodes_per_token_L.max() <= 1


def test_the_faster_of_one_part_and_two_is_taken() -> None:
    two = replace(H100, supports_two_batch=True, memory_bytes=1e9)
    one = replace(two, supports_two_batch=False)
    experts = ExpertParallel(CLUSTER, Workload(), 0)
    assert (experts.curve(two, CONTEXT).tpot_s <= experts.curve(one, CONTEXT).tpot_s).all()


def test_tensor_parallel_counts_sequences_per_rank() -> None:
    group = TensorParallel(MOSAIC, H100, num_nodes=1, ranks_per_node=2)
    small = replace(H100, memory_bytes=room_for(5, group.of_rank).memory_bytes)
    group = TensorParallel(MOSAIC, small, num_nodes=1, ranks_per_node=2)
    curve = tensor_parallel_curve(group, CONTEXT, Workload(), 0)
    assert curve.tokens_per_rank.tolist() == [0.5, 1.0, 1.5, 2.0, 2.5]
    assert curve.throughput.tolist() == (curve.tokens_per_rank / curve.tpot_s).tolist()
