"""Parameters and FLOP against DeepSeek-V3's published ones, the loader, and a count by torch."""

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from cluster.model.checkpoint import Checkpoint
from cluster.model.config import ModelConfig
from cluster.model.loader import Loader
from comms.topology import Topology
from simulations import arithmetic
from simulations.deployment import Deployment
from simulations.presets import load_model

V3 = load_model("deepseek-v3")
ARCHITECTURES = ["deepseek_v3_qlora", "deepseek_v2_greedy", "mixtral", "qwen3_moe_norm"]


def test_deepseek_v3_by_operation():
    """Counted by hand from the paper's sizes (arXiv:2412.19437, section 4.2)."""
    attention = arithmetic.attention(V3)
    assert attention.params == pytest.approx(187.1e6, rel=1e-3)
    assert attention.flop_per_pair_decode == 128 * 2 * (512 + 64 + 512)
    assert attention.flop_per_pair_prefill == 128 * 2 * (128 + 64 + 128)
    assert sum(g.params for g in arithmetic.dense_mlp(V3)) == 3 * 7168 * 18432
    assert sum(g.params for g in arithmetic.shared_expert(V3)) == 3 * 7168 * 2048
    assert sum(g.flop_per_row for g in arithmetic.routed_expert(V3)) * 8 == pytest.approx(
        704.6e6, 1e-3
    )
    assert arithmetic.gate(V3).params == 256 * 7168
    assert arithmetic.head(V3).flop_per_row == pytest.approx(1.853e9, rel=1e-3)


def test_deepseek_v3_in_all():
    assert arithmetic.total_params(V3) == pytest.approx(671.0e9, rel=5e-4)
    assert arithmetic.active_params(V3) == pytest.approx(36.6e9, rel=1e-3)
    assert arithmetic.decode_flop(V3, 4096) == pytest.approx(142.8e9, rel=5e-4)
    assert arithmetic.prefill_flop(V3, 4096) == pytest.approx(81.6e9, rel=5e-4)
    topology = Topology(num_nodes=8, ranks_per_node=8, tensor_parallel_size=1)
    deployment = Deployment(model=V3, topology=topology)
    assert deployment.kv_bytes_per_token == 70_272
    assert dataclasses.replace(deployment, kv_dtype="float8").kv_bytes_per_token == 70_272 // 2
    assert (deployment.dispatch_row_bytes, deployment.combine_row_bytes) == (7392, 14336)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_flop_are_those_that_torch_counts_in_transformers(tiny_checkpoint, name):
    """Its attention computes hidden pairs too, and gives logits for all tokens."""
    from transformers import AutoModelForCausalLM

    directory, tokens = tiny_checkpoint(name), 24
    reference = AutoModelForCausalLM.from_pretrained(
        directory, attn_implementation="eager", experts_implementation="eager"
    )
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        reference(torch.arange(tokens)[None])
    model = load_model(str(directory))
    core = model.num_layers * tokens**2 * arithmetic.attention(model).flop_per_pair_prefill
    assert counter.get_total_flops() == 2 * tokens * arithmetic.active_params(model) + core


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_ranks_weights_are_those_it_loads(tiny_checkpoint, name, size):
    directory = tiny_checkpoint(name)
    loader = Loader(
        checkpoint=Checkpoint(directory),
        config=ModelConfig.from_dir(directory),
        topology=Topology(num_nodes=1, ranks_per_node=size),
        rank=size - 1,
        dtype=torch.float32,
    )
    model = load_model(str(directory))
    weights = vars(loader.attention(0)).values()
    loaded = sum(w.numel() for w in weights if isinstance(w, torch.Tensor))
    work = arithmetic.attention(model, size)
    assert work.params == loaded
    plain = (*work.before_prefill, *work.after_prefill)
    assert sum(gemm.params for gemm in plain) == loaded
    assert arithmetic.head(model, size).params == loader.head(loader.embedding()).numel()
    dense = next((i for i in range(model.num_layers) if i not in model.moe_layers), None)
    if dense is not None:
        mlp = loader.dense_mlp(dense)
        assert sum(g.params for g in arithmetic.dense_mlp(model, size)) == sum(
            w.numel() for w in vars(mlp).values()
        )


def test_products_of_several_weights():
    gemm = arithmetic.Gemm(n=3, k=5, count=2)
    assert (gemm.params, gemm.flop_per_row, gemm.values_per_row) == (30, 60, 16)


REFUSED = [
    ({"num_redundant_experts": 1}, r"\(256 \+ 1\) % 64 = 1; add 63 redundant"),
    ({"num_redundant_experts": -64}, "must be >= 0"),
    ({"weights": "int4"}, "weights must be one of float8, bfloat16"),
    ({"dispatch_dtype": "int3"}, "dispatch_dtype must be one of"),
    ({"dispatcher": "ring"}, "hierarchical, flat, low_latency"),
    ({"overlap": "three_batch"}, "none, two_batch"),
    ({"topology": Topology(num_nodes=1, ranks_per_node=256)}, r"128 % 256"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED)
def test_layouts_that_cannot_be_show_the_equation(change, message):
    topology = Topology(num_nodes=8, ranks_per_node=8, tensor_parallel_size=1)
    with pytest.raises(ValueError, match=message):
        Deployment(**{"model": V3, "topology": topology, **change})


def test_slots_and_bytes_of_a_deployment():
    topology = Topology(num_nodes=8, ranks_per_node=8, tensor_parallel_size=1)
    deployment = Deployment(model=V3, topology=topology, num_redundant_experts=64)
    assert (deployment.num_slots, deployment.slots_per_rank) == (320, 5)
    assert deployment.expert_bytes == 44_040_192
    wider = dataclasses.replace(deployment, weights="bfloat16")
    assert wider.expert_bytes == 2 * deployment.expert_bytes
