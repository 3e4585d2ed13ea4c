"""Memory against the real loader, byte for byte, and against DeepSeek-V3's published layouts."""

import dataclasses

import pytest
import torch

from cluster.config import CommsConfig
from cluster.model.config import ModelConfig
from cluster.model.kv_cache import KVCache
from cluster.model.transformer import Transformer
from comms.groups import ParallelGroups
from comms.solo import SoloGroup
from comms.topology import Topology
from router.placement import Placement
from simulations import arithmetic
from simulations.deployment import Deployment
from simulations.hardware.calibration import Calibration
from simulations.memory import (
    DoesNotFit,
    expert_slot_bytes,
    kv_capacity_tokens,
    rank_memory,
    replicated_bytes,
)
from simulations.presets import load_model
from tests.model.conftest import MOSAIC

H100 = dataclasses.replace(Calibration.named("h100-published"), memory_bytes=80e9)
LAYOUTS = [(1, 1, 1), (2, 2, 2), (2, 2, 1), (1, 4, 4)]
CHECKPOINTS = ["mosaic", "deepseek_v3_qlora", "deepseek_v2_greedy", "mixtral", "qwen3_moe_norm"]


def loaded(directory, topology, rank) -> Transformer:
    """What this rank loads; nothing is said to the others."""
    config = ModelConfig.from_dir(directory)
    names = ("world", "node", "rail", "tp", "leaders")
    groups = {name: SoloGroup(name=name, rank=0) for name in names}
    parallel = ParallelGroups(topology=topology, rank=rank, epoch=0, **groups)
    placement = Placement.contiguous(config.num_moe_layers, config.num_experts, topology.world_size)
    comms = CommsConfig(all2all_backend="flat", combine="node")
    return Transformer.load(directory, config, parallel, placement, torch.bfloat16, comms)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_weights_are_what_the_fullest_rank_loads(tiny_checkpoint, name, layout):
    directory = MOSAIC if name == "mosaic" else tiny_checkpoint(name)
    nodes, ranks, size = layout
    topology = Topology(num_nodes=nodes, ranks_per_node=ranks, tensor_parallel_size=size)
    model = load_model(str(directory))
    redundant = -model.num_experts % topology.world_size
    deployment = Deployment(
        model=model, topology=topology, num_redundant_experts=redundant, weights="bfloat16"
    )
    reports = [loaded(directory, topology, rank).memory() for rank in range(topology.world_size)]
    others = [report["attention"] + report["other"] for report in reports]
    assert replicated_bytes(deployment) == max(others)
    assert expert_slot_bytes(deployment) == max(report["experts"] for report in reports)
    cache = KVCache(model, topology, 3, 16, torch.bfloat16)
    assert deployment.kv_bytes_per_token * 48 == cache.num_bytes


def v3(nodes, redundant=0, **options) -> Deployment:
    topology = Topology(num_nodes=nodes, ranks_per_node=8, tensor_parallel_size=1)
    model = load_model("deepseek-v3")
    return Deployment(model=model, topology=topology, num_redundant_experts=redundant, **options)


@pytest.mark.parametrize(
    ("nodes", "redundant", "gigabytes"),
    [(8, 0, 29.2), (8, 64, 31.7), (9, 32, 29.2), (18, 32, 24.1)],
)
def test_deepseek_v3_per_card(nodes, redundant, gigabytes):
    """Published sums count gates as FP8, ours are fp32; they leave out norms and rotary tables."""
    deployment = v3(nodes, redundant)
    weights = replicated_bytes(deployment) + expert_slot_bytes(deployment)
    wider_gates = 3 * 58 * arithmetic.gate(deployment.model).params
    assert (weights - wider_gates) / 1e9 == pytest.approx(gigabytes, abs=0.15)


def test_what_is_free_is_room_for_keys():
    deployment = v3(8)
    tokens = kv_capacity_tokens(deployment, H100, max_tokens=256)
    full = rank_memory(deployment, H100, max_tokens=256, kv_tokens=tokens)
    assert 0 <= full.free < deployment.kv_bytes_per_token
    assert full.total + full.free == full.capacity == 80e9
    assert full.as_dict()["kv"] == tokens * 70_272
    with pytest.raises(DoesNotFit, match=f"use at most {tokens:,} tokens of cache a replica"):
        rank_memory(deployment, H100, max_tokens=256, kv_tokens=tokens + 1)


def test_more_of_anything_needs_more():
    base = rank_memory(v3(8), H100, max_tokens=128, kv_tokens=1000)
    assert rank_memory(v3(8, 64), H100, max_tokens=128, kv_tokens=1000).experts > base.experts
    wider = rank_memory(v3(8), H100, max_tokens=4096, kv_tokens=1000)
    assert wider.activations > base.activations
    assert wider.buffers > base.buffers
    padded = rank_memory(v3(8, dispatcher="low_latency"), H100, max_tokens=128, kv_tokens=1000)
    assert padded.buffers > base.buffers


def test_refusals_say_by_how_much_and_what_to_do():
    with pytest.raises(DoesNotFit) as error:
        rank_memory(v3(1), H100, max_tokens=128, kv_tokens=0)
    assert str(error.value).startswith("deepseek_v3 on 1 nodes x 8 ranks needs 101.")
    assert "80.0 GB are there: 21." in str(error.value)
    assert str(error.value).endswith("use 2 nodes")
    with pytest.raises(DoesNotFit, match="use weights in float8"):
        rank_memory(v3(2, weights="bfloat16"), H100, max_tokens=128, kv_tokens=0)
    small = dataclasses.replace(H100, memory_bytes=8e9)
    with pytest.raises(DoesNotFit, match="no number of nodes is enough"):
        kv_capacity_tokens(v3(8), small)


def test_the_remedy_works():
    half = dataclasses.replace(H100, memory_bytes=40e9)
    with pytest.raises(DoesNotFit) as error:
        rank_memory(v3(2), half, max_tokens=128, kv_tokens=0)
    nodes = int(str(error.value).rsplit("use ", 1)[1].split()[0])
    rank_memory(v3(nodes), half, max_tokens=128, kv_tokens=0)
    with pytest.raises(DoesNotFit):
        rank_memory(v3(nodes // 2), half, max_tokens=128, kv_tokens=0)
