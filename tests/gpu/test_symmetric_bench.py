"""`expertmesh bench dispatch --device cuda`: what it refuses, and one small run where there are two GPUs."""

import json

import pytest
import torch

from deploy.bench.dispatch_gpu import dispatch_gpu_command
from simulations.bench.bench_dispatch_gpu import DEEPEP_US
from simulations.bench.exchange_workload import GpuWorkload

SMALL = {"tokens": (48,), "hidden": 256, "num_experts": 8, "num_topk": 2}


def test_workloads_that_cannot_be(capsys) -> None:
    assert dispatch_gpu_command({"ranks": 3}, None) == 2
    assert "256 % 3 = 1" in capsys.readouterr().err
    assert dispatch_gpu_command({"tokens": ()}, None) == 2


def test_machines_without_the_gpus(capsys, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert dispatch_gpu_command({}, None) == 1
    assert "need 2 GPUs, there are 1" in capsys.readouterr().err


def test_layouts_follow_the_workload() -> None:
    layout = GpuWorkload().layout("float8", "node")
    assert (layout.slots_per_rank, layout.capacity, layout.world_size) == (128, 4096, 2)
    assert set(DEEPEP_US["combine_sums"]) == set(GpuWorkload().tokens)


@pytest.mark.usefixtures("both_gpus")
def test_a_small_run(tmp_path) -> None:
    path = tmp_path / "report.json"
    assert dispatch_gpu_command(SMALL, path) == 0
    report = json.loads(path.read_text())
    assert report["checks"]["bitwise_reference"]
    assert {"dispatch_float8", "combine_fixed", "nccl"} <= set(report["results"])
    for sizes in report["results"].values():
        assert set(sizes) == {"48"}
        assert all(0 < figures["us"] < 1e6 for figures in sizes.values())
