"""The model of the GPU with plain torch for its kernels, beside the CPU's model: wiring and roundings."""

import pytest
import torch

from cluster.config import CommsConfig
from cluster.model.batch import ForwardBatch
from cluster.model.checkpoint import Checkpoint
from cluster.model.config import ModelConfig
from cluster.model.cuda.gains import expert_gain
from cluster.model.cuda.inputs import StepInputs, spare_slot
from cluster.model.cuda.random_weights import RandomWeights
from cluster.model.cuda.transformer import CudaTransformer
from cluster.model.loader import Loader
from experts.gains import expert_gains
from router.placement import Placement
from tests.gpu.plain_ops import PlainOps
from tests.model.solo import load_solo, make_batch, new_cache, solo_groups

CPU = torch.device("cpu")
BLOCK_SIZE = 16


def load_plain(directory, **comms) -> CudaTransformer:
    config, groups = ModelConfig.from_dir(directory), solo_groups()
    placement = Placement.contiguous(config.num_moe_layers, config.num_experts, 1)
    loader = Loader(
        checkpoint=Checkpoint(directory),
        config=config,
        topology=groups.topology,
        rank=0,
        dtype=torch.bfloat16,
    )
    return CudaTransformer.build(
        loader, groups, placement, CommsConfig(**comms), device=CPU, ops=PlainOps()
    )


def prompt(config, length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, config.vocab_size, (length,), generator=generator).tolist()


@pytest.mark.parametrize("name", ["deepseek_v3_yarn", "qwen3_moe_norm"])
def test_logits_are_those_of_the_cpu_up_to_rounding(tiny_checkpoint, name):
    directory = tiny_checkpoint(name)
    cpu, plain = load_solo(directory, torch.bfloat16), load_plain(directory)
    caches = new_cache(cpu, 8, BLOCK_SIZE, torch.bfloat16), plain.new_cache(8, BLOCK_SIZE)
    ids = prompt(cpu.config, 21)
    steps = [[(ids[:20], 0, [3, 5], range(20))], [(ids[20:], 20, [3, 5], [0])]]
    for parts in steps:
        batch = make_batch(parts, BLOCK_SIZE)
        expected, found = cpu.forward(batch, caches[0]), plain.forward(batch, caches[1])
        error = (found - expected).norm(dim=1) / expected.norm(dim=1)
        assert error.max() < 0.05, error
    assert plain.expert_load() == cpu.expert_load()
    assert plain.memory() == cpu.memory()


def test_padding_changes_nothing_and_writes_to_the_spare_block(tiny_checkpoint):
    plain = load_plain(tiny_checkpoint("deepseek_v3_qlora"))
    ids = prompt(plain.config, 3)
    batch = make_batch([([token], 0, [2 * i], [0]) for i, token in enumerate(ids)], BLOCK_SIZE)
    kv, padded_kv = plain.new_cache(6, BLOCK_SIZE), plain.new_cache(6, BLOCK_SIZE)
    expected = plain.forward(batch, kv)
    inputs = StepInputs.empty(5, 5, 4, 5, CPU)
    inputs.fill(batch, spare_slot(padded_kv))
    found = plain.compute(inputs, padded_kv)
    assert torch.equal(found[:3], expected)
    for layer, padded in zip(kv.layers, padded_kv.layers, strict=True):
        assert torch.equal(layer.keys[:, :6], padded.keys[:, :6])
    assert kv.num_blocks == 6


def test_gains_are_those_of_the_cpu(tiny_checkpoint):
    model = load_solo(tiny_checkpoint("deepseek_v3_qlora"), torch.bfloat16)
    for layer in model.layers[1:]:
        slots = layer.mlp.slots
        found = [
            expert_gain(slots[s].w13, slots[s].w2, layer.mlp_norm.weight)
            for s in range(slots.num_slots)
        ]
        assert found == expert_gains(slots, layer.mlp_norm.weight).tolist()


def test_gains_are_of_the_norm_that_the_layer_has(tiny_checkpoint):
    """Also where a source draws its weights anew each time that it is asked."""
    config, groups = ModelConfig.from_dir(tiny_checkpoint("deepseek_v3_qlora")), solo_groups()
    placement = Placement.contiguous(config.num_moe_layers, config.num_experts, 1)
    source, fixed = RandomWeights(config, CPU), CommsConfig(combine="fixed")
    model = CudaTransformer.build(source, groups, placement, fixed, device=CPU, ops=PlainOps())
    for idx in config.moe_layers:
        layer, slots = model.layers[idx], model.layers[idx].mlp.slots
        expected = [
            expert_gain(*slots.matrices(slot), layer.mlp_norm.weight)
            for slot in range(slots.num_slots)
        ]
        assert layer.mlp.gains_E.tolist() == expected


def test_tokens_outside_the_vocabulary_are_refused(tiny_checkpoint):
    plain = load_plain(tiny_checkpoint("mixtral"))
    batch = make_batch([([131], 0, [0], [0])], BLOCK_SIZE)
    with pytest.raises(ValueError, match=r"token ids must be in \[0, 131\)"):
        plain.forward(batch, plain.new_cache(1, BLOCK_SIZE))
    assert plain.forward(ForwardBatch.empty(), plain.new_cache(1, BLOCK_SIZE)).shape == (0, 131)
