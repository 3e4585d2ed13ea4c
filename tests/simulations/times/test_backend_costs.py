"""What a calibration may say of a backend beyond links and products, against closed forms."""

import numpy as np
import pytest

from comms.topology import Topology
from simulations.cost import CostModel, StepWork
from simulations.deployment import Deployment
from simulations.presets import load_model
from simulations.times.op_times import OpTimes
from tests.simulations.calibrations import ROUND, calibration

V3 = load_model("deepseek-v3")
DISPATCH_ROW, COMBINE_ROW = 7168 + 7168 // 128 * 4, 2 * 7168


def deployment(**options) -> Deployment:
    topology = Topology(num_nodes=8, ranks_per_node=8, tensor_parallel_size=1)
    return Deployment(model=V3, topology=topology, **options)


def even(of: Deployment, tokens_per_rank: int):
    pairs = tokens_per_rank * of.num_ranks * 8 / of.num_slots
    return np.full((1, 58, of.num_slots), pairs, dtype=np.float32)


def exchanges(dispatcher: str, low_latency):
    cost = CostModel(deployment(dispatcher=dispatcher), calibration(low_latency=low_latency))
    dispatch, combine = cost.exchange_seconds(
        np.full((1, 1, 64), 128.0 * 8), None, np.full((1, 64), 128.0)
    )
    return float(dispatch.max()), float(combine.max())


@pytest.mark.parametrize(("network_only", "crossing"), [(False, 56 / 64), (True, 63 / 64)])
def test_low_latency_kernels_have_links_of_their_own(network_only, crossing) -> None:
    links = {
        "dispatch": {"network": {"alpha_s": 4e-5, "beta": 3e10}},
        "combine": {"network": {"alpha_s": 5e-5, "beta": 2e10}},
        "network_only": network_only,
    }
    rows = 128 * 8 * crossing
    assert exchanges("low_latency", links) == pytest.approx(
        (4e-5 + rows * DISPATCH_ROW / 3e10, 5e-5 + rows * COMBINE_ROW / 2e10), rel=1e-6
    )
    assert exchanges("flat", links) == exchanges("flat", {})


def test_units_that_sending_and_receiving_hold_are_missed_by_computation() -> None:
    of = deployment(dispatcher="low_latency", overlap="two_batch")
    work, slot_tokens = StepWork.decode([[256]], [[32768]]), even(of, 256)

    def layers(**overlap):
        return CostModel(
            of, calibration(overlap={**ROUND["overlap"], **overlap})
        ).step(work, slot_tokens).layers  # fmt: skip

    free, held = layers(), layers(held_s=5e-5)
    # So long a context hides the combine, whose 50 us are then added; the dispatch hides its own.
    assert (held.total - free.total) == pytest.approx(2 * 5e-5, rel=1e-3)
    assert held.exposed_BL + held.hidden_BL == pytest.approx(free.exposed_BL + free.hidden_BL)


def test_an_exchange_beside_computation_is_slower_but_not_alone() -> None:
    work = StepWork.prefill([[8192]], [[1024]])
    for overlap, times in (("none", 1.0), ("two_batch", 1.5)):
        of = deployment(overlap=overlap)
        of_round, slowed = (
            CostModel(of, calibration(overlap={**ROUND["overlap"], "exchange_slowdown": slowdown}))
            .step(work, even(of, 8192))
            .layers
            for slowdown in (1.0, 1.5)
        )
        assert slowed.dispatch == pytest.approx(times * of_round.dispatch)
        assert slowed.combine == pytest.approx(times * of_round.combine)


def test_gaps_between_kernels_are_those_of_every_micro_batch() -> None:
    overheads = {
        overlap: CostModel(
            deployment(overlap=overlap), calibration(overheads={"step_s": 1e-3, "layer_s": 1e-5})
        )
        .step(StepWork.decode([[64]], [[1024]]), even(deployment(), 64))
        .overhead_B[0]
        for overlap in ("none", "two_batch")
    }
    assert overheads == pytest.approx({"none": 1e-3 + 61 * 1e-5, "two_batch": 1e-3 + 2 * 61 * 1e-5})


def test_measured_gate_and_elementwise_work_replace_the_roofline() -> None:
    table = {"axes": {"tokens": [100, 200]}, "unit": "s", "values": [7e-6, 9e-6]}
    name = "elementwise/attention/7168"
    plain = OpTimes(deployment(), calibration(), print)
    measured = OpTimes(
        deployment(), calibration(tables={"gate/256x7168": table, name: table}), print
    )
    work = StepWork.decode([[200]], [[1024]])
    assert measured.gate(work) == pytest.approx(9e-6)
    norm = 200 * 7168 * 11 / 2e12
    assert measured.before_core(work) - plain.before_core(work) == pytest.approx(9e-6 - norm)


def test_prompts_expand_keys_and_values_in_one_product() -> None:
    table = {"axes": {"tokens": [100, 200]}, "unit": "s", "values": [1.0, 2.0]}
    ops = OpTimes(deployment(), calibration(tables={"gemm/float8/32768x512": table}), print)
    prompts, decode = StepWork.prefill([[200]], [[200]]), StepWork.decode([[200]], [[200]])
    assert ops.before_core(prompts) > 2.0 > ops.before_core(decode)
    # Decoding multiplies by the same weights, head by head, on both sides of the core.
    assert ops.after_core(prompts) < ops.after_core(decode)
