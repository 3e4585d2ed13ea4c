"""Fits give back the constants of made-up machines, whose times are computed here by plain loops."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from simulations.arithmetic import Gemm
from simulations.hardware import fit
from simulations.hardware.tables import Table
from simulations.presets import load_model
from tests.simulations.calibrations import calibration

ROWS = (1, 5, 20, 60, 65, 100, 130, 250, 260, 500, 520, 1000, 4096, 16384)
SHAPES = ((2112, 7168), (7168, 16384), (256, 7168), (4096, 7168))


def machine(overhead_s, tile, peak, bandwidth):
    """Tables of products of a machine that does what the cost model says."""
    tables = {}
    for n, k in SHAPES:
        seconds = []
        for rows in ROWS:
            flop = 2 * n * k * -(-rows // tile) * tile
            num_bytes = 2 * n * k + 2 * rows * (n + k)
            seconds.append(overhead_s + max(flop / peak, num_bytes / bandwidth))
        tables[Gemm(n=n, k=k)] = Table(axes={"tokens": ROWS}, values=np.array(seconds))
    return tables


@pytest.mark.parametrize(("overhead_s", "tile"), [(2e-6, 1), (8e-6, 64), (2e-5, 128)])
def test_overhead_and_tile_are_found(overhead_s, tile):
    known = calibration(peak_flops={"bfloat16": 4e13, "float8": 1e15})
    tables = machine(overhead_s, tile, 4e13, known.memory_bandwidth)
    launch = fit.fit_launch(load_model("deepseek-v3"), known, tables, "bfloat16")
    assert launch.overhead_s == pytest.approx(overhead_s, rel=0.1)
    assert launch.tile == tile


def test_peak_is_that_of_many_rows():
    assert fit.peak_flops(machine(3e-6, 64, 5e14, 2e12)) == pytest.approx(5e14, rel=0.02)


def test_products_are_found_by_name():
    table = Table(axes={"tokens": (1.0,)}, values=np.array([1.0]))
    names = ["gemm/bfloat16/8x4", "gemm/float8/8x4", "bmm/bfloat16/2/8x4", "gate/8x4"]
    assert fit.products(dict.fromkeys(names, table), "bfloat16") == {Gemm(n=8, k=4): table}


def test_attention_is_found():
    model = load_model("deepseek-v3")
    known = replace(calibration(), decode_flops=2e14, attention_overhead_s=2e-5)
    sequences, contexts = (1.0, 8.0, 64.0, 256.0), (512.0, 4096.0, 32768.0)
    seconds = [
        [2e-5 + max(b * s * 278_528 / 2e14, b * s * 1152 / 2e12) for s in contexts]
        for b in sequences
    ]
    decode = Table(axes={"sequences": sequences, "context": contexts}, values=np.array(seconds))
    prompts = np.array([512.0, 4096.0, 16384.0])
    flop = 81_920 * prompts * (prompts + 1) / 2
    prefill = Table(axes={"tokens": tuple(prompts)}, values=flop / 3e14)
    found = fit.fit_attention(model, known, decode, prefill)
    assert found["decode_flops"] == pytest.approx(2e14, rel=0.03)
    assert found["overhead_s"] == pytest.approx(2e-5, rel=0.2)
    assert found["prefill_flops"] == pytest.approx(3e14, rel=1e-6)


@given(st.floats(1e-7, 1e-2), st.floats(1e6, 1e12))
def test_a_link_is_found(alpha_s, beta):
    sizes = np.array([64, 4096, 2**20, 2**28])
    link = fit.fit_link(sizes, alpha_s + sizes / beta)
    predicted = link["alpha_s"] + sizes / link["beta"]
    np.testing.assert_allclose(predicted, alpha_s + sizes / beta, rtol=2e-3)


@pytest.mark.parametrize("seconds", [[3e-5, 2e-5, 1e-5], [1e-9, 1e-6, 1e-2]])
def test_noise_makes_no_impossible_link(seconds):
    link = fit.fit_link([1, 1000, 2000], seconds)
    assert link["alpha_s"] >= 0
    assert 0 < link["beta"] <= fit.MOST_BETA
