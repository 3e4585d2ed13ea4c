"""Experts divided over two GPUs: `mosaic` gives every sequence the bits that one GPU gives it."""

import pytest
import torch

from cluster.config import CommsConfig
from cluster.model.config import ModelConfig
from comms.groups import ParallelGroups
from comms.launch import RankPool
from comms.topology import Topology
from router.placement import Placement
from tests.gpu.greedy import BLOCKS, MOSAIC, Sequence, decode, load_on, prompts

PROMPT_TOKENS = 9
NUM_TOKENS = 24
PAIR = Topology(num_nodes=1, ranks_per_node=2, tensor_parallel_size=1)


def sequences(rank: int) -> list[Sequence]:
    """Two of the prompts, cut to one length: ranks make the same passes with as many rows."""
    ids = prompts()[2 * rank : 2 * rank + 2]
    return [
        Sequence(ids=(row * 3)[:PROMPT_TOKENS], first=i * BLOCKS, wanted=NUM_TOKENS)
        for i, row in enumerate(ids)
    ]


def decode_on_rank(groups: ParallelGroups) -> list[tuple[list[int], list]]:
    from cluster.model.cuda.transformer import CudaTransformer

    torch.cuda.set_device(groups.rank)
    config = ModelConfig.from_dir(MOSAIC)
    placement = Placement.contiguous(config.num_moe_layers, config.num_experts, 2)
    model = CudaTransformer.load(MOSAIC, config, groups, placement, CommsConfig())
    kv = model.new_cache(2 * BLOCKS, 16)
    return [
        (s.tokens, [row.numpy() for row in s.logits])
        for s in decode(model, kv, sequences(groups.rank))
    ]


@pytest.mark.usefixtures("both_gpus")
def test_experts_on_two_gpus_change_no_bit():
    with RankPool(2) as pool:
        of_ranks = pool.run(decode_on_rank, PAIR, timeout_s=120, comm_timeout_s=120)
    model = load_on(torch.device("cuda", 0))
    for rank, found in enumerate(of_ranks):
        expected = decode(model, model.new_cache(2 * BLOCKS, 16), sequences(rank))
        for (tokens, logits), wanted in zip(found, expected, strict=True):
            assert tokens == wanted.tokens
            for a, b in zip(logits, wanted.logits, strict=True):
                assert torch.equal(torch.from_numpy(a), b)
