"""Predictions against closed forms and sums over published times."""

from __future__ import annotations

from typing import Any

import pytest

from simulations.scoreboard.predict import predict

S5: dict[str, Any] = {
    "nodes": 16,
    "redundant": 0,
    "requests": 128,
    "context": 4096,
    "tokens_per_request": 2,
    "accepted": 1.6,
    "overlap": "two_batch",
    "balance": "exact",
    "dispatcher": "low_latency",
    "calibration": "h800-deepep-v1",
}


def test_least_time_of_two_exchanges() -> None:
    bytes_ = 32 * 9 * 7168 * (1 + 2)
    predicted = predict("bound", {"tokens": 32, "destinations": 9, "bandwidth": 50e9})
    assert predicted == pytest.approx(bytes_ / 50e9 * 1e6)


def test_low_latency_rows_all_cross_the_network_where_it_is_rdma_alone() -> None:
    link = (36.91e-6, 49.83e9)  # of the calibration's low-latency dispatch
    rows = 128 * 8 * 127 / 128
    conditions = {
        "way": "dispatch",
        "nodes": 16,
        "tokens": 128,
        "dispatcher": "low_latency",
        "calibration": "h800-deepep-v1",
    }
    expected = link[0] + rows * (7168 + 56 * 4) / link[1]
    assert predict("exchange", conditions) == pytest.approx(expected * 1e6, rel=1e-6)


def test_a_layer_of_the_decode_profile_is_the_sum_of_its_published_kernels() -> None:
    """Dispatch, grouped products and combine are in line, attention hides under the last."""
    dispatch, experts, combine, attention, dense_mlp = 187, 81 + 8 + 39, 394, 388, 150
    layers_us = 58 * 2 * (dispatch + experts + combine) + 3 * 2 * (attention + dense_mlp)
    predicted_ms = predict("decode", {**S5, "layers_only": True, "output": "step_ms"})
    assert predicted_ms == pytest.approx(layers_us / 1e3, rel=0.05)


def test_throughput_is_tokens_over_the_step() -> None:
    step_ms = predict("decode", {**S5, "output": "step_ms"})
    assert predict("decode", S5) == pytest.approx(8 * 128 * 1.6 / step_ms * 1e3)


def test_a_ratio_to_itself_is_one() -> None:
    side = {"kind": "decode", **S5, "balance": "random"}
    assert predict("ratio", {"of": side, "to": side}) == 1.0


@pytest.mark.parametrize(
    ("kind", "conditions", "message"),
    [
        ("training", {}, "unknown kind 'training': choose from decode, prefill"),
        ("bound", {"tokens": 32}, "conditions of kind 'bound'.*destinations"),
        ("decode", {**S5, "colour": "red"}, "conditions of kind 'decode'.*colour"),
        ("decode", {**S5, "redundant": 1}, "add 127 redundant experts"),
    ],
)
def test_what_cannot_be_predicted_is_refused(
    kind: str, conditions: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        predict(kind, conditions)
