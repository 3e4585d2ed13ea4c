"""A small model by the kernels, in Triton's interpreter, beside plain torch: every kernel fits the others."""

from dataclasses import replace

import pytest
import torch

from cluster.config import CommsConfig
from cluster.model.config import GqaConfig, ModelConfig
from cluster.model.cuda.random_weights import RandomWeights
from cluster.model.cuda.transformer import CudaTransformer
from router.placement import Placement
from simulations.presets import load_model
from tests.gpu.plain_ops import PlainOps
from tests.model.solo import make_batch, solo_groups

CPU = torch.device("cpu")


def small(kind: str, positions: int = 64) -> ModelConfig:
    """Two layers, one of them dense, of the architecture."""
    config = load_model({"mla": "deepseek-v3", "gqa": "qwen3-235b"}[kind])
    if isinstance(config.attention, GqaConfig):
        attention = replace(config.attention, num_heads=4, num_kv_heads=2, head_dim=32)
        rotary = 32
    else:
        attention = replace(
            config.attention, num_heads=2, q_lora_rank=32, kv_lora_rank=64,
            qk_nope_head_dim=32, qk_rope_head_dim=32, v_head_dim=32,
        )  # fmt: skip
        rotary = 32
    groups = {"num_groups": 2, "num_groups_per_token": 1} if kind == "mla" else {}
    return replace(
        config,
        vocab_size=96,
        hidden_size=128,
        num_layers=2,
        max_position_embeddings=positions,
        attention=attention,
        rope=replace(config.rope, dim=rotary),
        gate=replace(config.gate, num_experts=4, num_experts_per_token=2, **groups),
        moe_layers=(1,),
        dense_intermediate_size=256,
        expert_intermediate_size=128,
        shared_intermediate_size=config.shared_intermediate_size and 128,
    )


def build(config: ModelConfig, quantization, combine: str, ops=None) -> CudaTransformer:
    placement = Placement.contiguous(1, config.num_experts, 1)
    return CudaTransformer.build(
        RandomWeights(config, CPU, seed=3), solo_groups(), placement,
        CommsConfig(combine=combine), quantization=quantization, device=CPU, ops=ops,
    )  # fmt: skip


def logits_of(model: CudaTransformer) -> list[torch.Tensor]:
    """Two prompts together, one of them in two chunks; then a token of each."""
    kv = model.new_cache(6, 4)
    a, b = [5, 9, 33, 70, 2], [8, 90]
    steps = [
        [(a[:3], 0, [1, 4], []), (b, 0, [3], [1])],
        [(a[3:], 3, [1, 4], [1])],
        [([44], 5, [1, 4], [0]), ([13], 2, [3], [0])],
    ]
    return [model.forward(make_batch(parts, 4), kv) for parts in steps]


def compare(kind: str, quantization: str, combine: str) -> None:
    """In a process whose Triton interprets."""
    config = small(kind)
    format_ = None if quantization == "none" else quantization
    found = logits_of(build(config, format_, combine))
    expected = logits_of(build(config, format_, combine, PlainOps()))
    bound = 0.03 if format_ is None else 0.25  # the interpreter cuts off where a GPU rounds
    for a, b in zip(found, expected, strict=True):
        error = ((a - b).norm(dim=1) / b.norm(dim=1)).max()
        print(f"{kind} {quantization} {combine}: relative L2 {float(error):.4f}")
        assert a.shape == b.shape
        assert error < bound


@pytest.mark.parametrize(
    ("kind", "quantization", "combine"),
    [("mla", "none", "fixed"), ("gqa", "none", "exact"), ("mla", "fp8", "exact")],
)
def test_kernels_compute_the_model(interpreted, kind, quantization, combine):
    interpreted("tests.gpu.test_model_interpreted:compare", kind, quantization, combine)
