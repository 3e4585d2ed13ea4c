"""Measuring a whole expert layer: every number is there on a GPU."""

import pytest
import torch

from simulations.bench import bench_moe_gpu


@pytest.mark.parametrize("dtype", ["float8"])
def test_every_part_is_timed(cuda: torch.device, dtype: str) -> None:
    report = bench_moe_gpu.run(hidden=512, intermediate=256, tokens=(16,), dtype=dtype)
    (case,) = report["cases"]
    assert 64 <= case["pairs"] <= 256
    assert case["pairs"] >= case["rows"] > 0
    assert case["layer_us"] > case["floor_us"] > 0
    assert all(time > 0 for time in case["parts_us"].values())
    assert sum(case["share"].values()) == pytest.approx(1, abs=0.01)
    assert "16 tokens a card" in bench_moe_gpu.table(report)
