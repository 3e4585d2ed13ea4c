"""Calibrating with our own kernels where there is no GPU: each table's calls are made once, interpreted."""

import json
from dataclasses import replace

import numpy as np
import torch

from cluster.model.config import GqaConfig, MlaConfig, ModelConfig
from comms.topology import Topology
from router.gate import GateConfig
from simulations.presets import load_model


def small(attention: GqaConfig | MlaConfig, *, shared: int, dense: bool) -> ModelConfig:
    """FP8's least sizes."""
    gate = GateConfig(
        num_experts=8, num_experts_per_token=2, scoring="softmax", num_groups=1,
        num_groups_per_token=1, group_score="max", renormalize=False, scaling_factor=1.0,
    )  # fmt: skip
    mosaic = load_model("mosaic")
    rope_dim = attention.qk_rope_head_dim if isinstance(attention, MlaConfig) else 16
    return replace(
        mosaic, vocab_size=64, hidden_size=128, num_layers=2, attention=attention, gate=gate,
        rope=replace(mosaic.rope, dim=rope_dim), moe_layers=(1,) if dense else (0, 1),
        expert_intermediate_size=128, shared_intermediate_size=shared, dense_intermediate_size=128,
    )  # fmt: skip


MLA = small(
    MlaConfig(
        num_heads=2, q_lora_rank=128, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=16,
        v_head_dim=16, softmax_scale=0.2,
    ),
    shared=256,
    dense=True,
)  # fmt: skip
GQA = small(
    GqaConfig(num_heads=4, num_kv_heads=2, head_dim=16, qk_norm=True, softmax_scale=0.25),
    shared=0,
    dense=False,
)


def every_lookup_is_measured() -> None:
    """A step of each model, in both dtypes, needs no formula but for links and overheads."""
    from simulations.cost import CostModel, StepWork
    from simulations.deployment import Deployment
    from simulations.hardware.calibration import Calibration
    from simulations.hardware.gpu_meter import OnceMeter
    from simulations.hardware.own_grids import OwnSizes, dtypes_of, grids
    from tests.simulations.calibrations import ROUND

    sizes = OwnSizes(
        rows=(3,), experts=(1, 8), tokens_per_expert=(2,), sequences=(2,), contexts=(20,),
        prompts=(20,),
    )  # fmt: skip
    meter = OnceMeter(device=torch.device("cpu"))
    tables = {grid.name: grid.table() for grid in grids([MLA, GQA], sizes, meter)}
    # An operation that has no table takes a day: nothing but tables may be looked at.
    slow = {"overhead_s": 1e5, "tile": 1}
    values = {
        **ROUND,
        "memory_bandwidth": 1.0,
        "gemm": {"bfloat16": slow, "float8": slow},
        "attention": {"overhead_s": 1e5, "absorbed_prompts": True},
        "tables": tables,
    }
    known = Calibration.from_json(json.dumps(values), "here")
    alone = Topology(num_nodes=1, ranks_per_node=1)
    for model in (MLA, GQA):
        assert dtypes_of(model) == ("bfloat16", "float8")
        for dtype in dtypes_of(model):
            cost = CostModel(Deployment(model=model, topology=alone, weights=dtype), known)
            slots = np.ones((1, model.num_moe_layers, model.num_experts), dtype=np.int64)
            for work in (StepWork.decode([[2]], 16), StepWork.prefill([[3]], 3)):
                layers = cost.step(work, slots).layers.total
                assert (layers > 0).all(), (dtype, layers)
                assert (layers < 1).all(), (dtype, layers)


def shares_are_all_calls() -> None:
    """Processes that compile make every call once between them."""
    from simulations.hardware.own_compile import shared

    parts = [shared(range(100), share, 7) for share in range(7)]
    assert sorted(call for part in parts for call in part) == list(range(100))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def checks() -> None:
    shares_are_all_calls()
    every_lookup_is_measured()


def test_tables_of_our_kernels(interpreted) -> None:
    interpreted("tests.gpu.test_own_calibration:checks", timeout_s=280)


def test_a_graph_is_timed(cuda) -> None:
    """A product of one row reads its weights from memory: from another copy each time, and once."""
    from simulations.arithmetic import Gemm
    from simulations.hardware.gpu_meter import GraphMeter
    from simulations.hardware.own_products import _whole

    gemm = Gemm(n=4096, k=4096)
    seconds = _whole(gemm, (1,), "bfloat16", GraphMeter(device=cuda)).time(1)
    bandwidth = 2 * gemm.params / seconds.p50
    assert 0.5e12 < bandwidth < 5e12
    assert seconds.p50 <= seconds.p99 < 2 * seconds.p50


def test_the_librarys_kernels_are_measured(cuda) -> None:
    """Each part of it, at sizes of no interest."""
    from simulations.hardware.measure_gpu import measure
    from simulations.hardware.measure_library import LibrarySizes

    sizes = LibrarySizes(
        rows=(1, 16), experts=(4,), tokens_per_expert=(16,), sequences=(2,), contexts=(64,),
        prompts=(64,), queries=(1,), tensor_parallel_sizes=(1,), held=(), skews=((4, 16),),
    )  # fmt: skip
    parts: list[str] = []
    found = measure([replace(load_model("deepseek-v3"), vocab_size=1024)], sizes, parts.append)
    kinds = {name.partition("/")[0] for name in found["tables"]}
    assert kinds >= {"gemm", "bmm", "grouped_gemm", "rows", "gate", "mla_decode", "elementwise"}
    for name, table in found["tables"].items():
        values = np.array(table["values"])
        assert ((values > 1e-7) & (values < 1e-2)).all(), name
    assert found["measured"]["memory_bandwidth"]["read"] > 1e12
    assert "attention" in parts
