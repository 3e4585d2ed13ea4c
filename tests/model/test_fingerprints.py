"""Fingerprints of experts: what every rank knows weights by, wherever they come from."""

import pytest
import torch

from cluster.model.checkpoint import Checkpoint
from cluster.model.config import ModelConfig
from cluster.model.errors import CheckpointError
from cluster.model.fingerprints import share_fingerprints
from cluster.model.loader import Loader
from comms.groups import ParallelGroups
from comms.topology import Topology
from experts.weights import ExpertWeights
from router.placement import Placement

NAMES = ("deepseek_v3_qlora", "mixtral", "qwen3_moe_norm")
TWO = Topology(num_nodes=2, ranks_per_node=1)


def loader_of(directory, topology: Topology, rank: int, dtype: torch.dtype) -> Loader:
    return Loader(
        checkpoint=Checkpoint(directory),
        config=ModelConfig.from_dir(directory),
        topology=topology,
        rank=rank,
        dtype=dtype,
    )


def read_alone(loader: Loader, layer: int, expert: int) -> ExpertWeights:
    config = loader.config
    weights = ExpertWeights(config.hidden_size, config.expert_intermediate_size, loader.dtype)
    loader.fill(weights, layer, expert)
    return weights


def shared(groups: ParallelGroups, directory, damaged: tuple[int, int] | None):
    """All fingerprints, after one bit of one (rank, layer)'s expert 0 was flipped; or the error."""
    loader = loader_of(directory, groups.topology, groups.rank, torch.bfloat16)
    config = loader.config
    placement = Placement.contiguous(
        config.num_moe_layers, config.num_experts, 2, num_redundant_experts=4, ranks_per_node=1
    )
    layers = [loader.experts(idx, placement) for idx in range(config.num_moe_layers)]
    for layer, slots in enumerate(layers):
        if damaged == (groups.rank, layer):
            experts = placement.experts_of_rank(layer, groups.rank)
            [slot] = [slot for slot, expert in experts.items() if expert == 0]
            slots[slot].data[5] ^= 1
    try:
        return share_fingerprints(layers, placement, groups.world, directory)
    except CheckpointError as error:
        return str(error)


@pytest.mark.parametrize("name", NAMES)
def test_every_rank_knows_the_fingerprint_of_what_the_checkpoint_holds(
    rank_pool, tiny_checkpoint, name
):
    directory = tiny_checkpoint(name)
    loader = loader_of(directory, TWO, 0, torch.bfloat16)
    config = loader.config
    expected = [
        [read_alone(loader, idx, e).fingerprint() for e in range(config.num_experts)]
        for idx in range(config.num_moe_layers)
    ]
    assert len({f for row in expected for f in row}) == config.num_moe_layers * config.num_experts
    for answer in rank_pool.run(shared, TWO, directory, None):
        assert answer.tolist() == expected


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_expert_read_alone_is_the_one_that_was_loaded(tiny_checkpoint, name, dtype):
    loader = loader_of(tiny_checkpoint(name), TWO, 1, dtype)
    placement = Placement.contiguous(loader.config.num_moe_layers, loader.config.num_experts, 2)
    for idx in range(loader.config.num_moe_layers):
        slots = loader.experts(idx, placement)
        for slot, expert in placement.experts_of_rank(idx, 1).items():
            alone = read_alone(loader, idx, expert)
            assert bytes(alone.data) == bytes(slots[slot].data)


@pytest.mark.parametrize("damaged", [(0, 0), (1, 1)])
def test_hosts_with_different_checkpoints_are_found_out(rank_pool, tiny_checkpoint, damaged):
    """On every rank; experts with one copy have nobody to differ from."""
    directory = tiny_checkpoint("qwen3_moe_norm")
    said = (
        f"{directory}: ranks [0, 1] have read different weights for expert 0 of expert layer "
        f"{damaged[1]}; all hosts need the same checkpoint"
    )
    assert rank_pool.run(shared, TWO, directory, damaged) == [said] * 2
