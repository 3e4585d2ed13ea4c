"""Measuring a whole expert layer: every number is there on a GPU, and refused without one."""

import pytest
import torch

from deploy.bench.moe_layer_gpu import layer_command
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


def test_options_that_cannot_be(capsys: pytest.CaptureFixture[str]) -> None:
    assert layer_command("cpu", 7168, 2048, [], None) == 2
    assert layer_command("cuda", 7168, 2048, ["int4"], None) == 2
    assert "--dtype int4" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert layer_command("cuda", 7168, 2048, [], None) == 1
        assert "needs a CUDA GPU" in capsys.readouterr().err
