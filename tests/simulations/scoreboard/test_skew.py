"""Fitted loads against what the tables that they were fitted to say themselves."""

from __future__ import annotations

import numpy as np
import pytest

from simulations.eplb import eplb, even_rank_loads
from simulations.scoreboard.skew import ANY_DECODE, DECODE, PREFILL, RECORDED, Skew, decode, prefill

# Of a table: max / mean of 32 ranks of 8 neighbouring experts, and of 32 ranks on 4 nodes under
# EPLB's plan with 288 slots, which keeps groups whole; means over its 58 layers.
TABLES = {
    "prefill 1024": (PREFILL[1024], 2.289, 1.166),
    "prefill 2048": (PREFILL[2048], 2.635, 1.234),
    "prefill 4096": (PREFILL[4096], 3.042, 1.317),
    "decode 2000": (DECODE, 2.633, 1.254),
}


@pytest.mark.parametrize("name", TABLES)
def test_ranks_are_as_unequal_as_in_the_table(name: str) -> None:
    skew, neighbours, planned = TABLES[name]
    load_LE = skew.loads(np.random.default_rng(1), 1000, 256)
    load_LE /= load_LE.mean(axis=1, keepdims=True)
    rank_LR = load_LE.reshape(1000, 32, 8).mean(axis=2)
    assert rank_LR.max(axis=1).mean() == pytest.approx(neighbours, rel=0.07)
    rank_LR = even_rank_loads(eplb(load_LE, 288, 8, 4, 32), load_LE, 32)
    imbalance_L = rank_LR.max(axis=1) / rank_LR.mean(axis=1)
    assert imbalance_L.mean() == pytest.approx(planned, rel=0.04)


def test_without_slope_loads_are_lognormal() -> None:
    load_LE = RECORDED.loads(np.random.default_rng(1), 400, 256)
    assert np.log(load_LE).std(axis=1).mean() == pytest.approx(0.673, rel=0.02)


def test_slope_alone_is_a_power_of_the_index() -> None:
    load_LE = Skew(spread=(0, 0), slope=(0.5, 0)).loads(np.random.default_rng(1), 2, 256)
    assert load_LE[:, 0] / load_LE[:, 12] == pytest.approx(2)


def test_the_table_is_of_the_phase_and_the_nearest_length() -> None:
    assert prefill("attached", 3000) is PREFILL[4096]
    assert prefill("attached", 512) is PREFILL[1024]
    assert decode("attached") is DECODE
    assert decode("attached", known=False) is ANY_DECODE
    assert prefill("recorded", 4096) is decode("recorded") is RECORDED
