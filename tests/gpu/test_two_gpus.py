"""Experts divided over two GPUs: `mosaic` gives every sequence the bits that one GPU gives it."""

import pytest
import torch

from cluster.config import CommsConfig
from cluster.model.checkpoint import Checkpoint
from cluster.model.config import ModelConfig
from cluster.model.loader import Loader
from comms.groups import ParallelGroups
from comms.launch import RankPool
from comms.store import connect_store, host_store
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


def decode_on_rank(groups: ParallelGroups, store_address: str) -> list[tuple[list[int], list]]:
    from cluster.model.cuda.exchange import SymmetricExchange
    from cluster.model.cuda.transformer import CudaTransformer
    from comms.symmetric_layout import SymmetricLayout

    torch.cuda.set_device(groups.rank)
    device, config = torch.device("cuda", groups.rank), ModelConfig.from_dir(MOSAIC)
    layout = SymmetricLayout(
        world_size=2,
        slots_per_rank=config.num_experts // 2,
        hidden=config.hidden_size,
        num_topk=config.gate.num_experts_per_token,
        capacity=512,
        combine="fixed",
    )
    exchange = SymmetricExchange.connect(
        layout, connect_store(store_address), groups.rank, device, groups.where
    )
    loader = Loader(
        checkpoint=Checkpoint(MOSAIC),
        config=config,
        topology=groups.topology,
        rank=groups.rank,
        dtype=torch.bfloat16,
    )
    placement = Placement.contiguous(config.num_moe_layers, config.num_experts, 2)
    model = CudaTransformer.build(
        loader, groups, placement, CommsConfig(), device=device, exchange=exchange
    )
    kv = model.new_cache(2 * BLOCKS, 16)
    return [
        (s.tokens, [row.numpy() for row in s.logits])
        for s in decode(model, kv, sequences(groups.rank))
    ]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")
def test_experts_on_two_gpus_change_no_bit():
    store, address = host_store()
    with RankPool(2) as pool:
        of_ranks = pool.run(decode_on_rank, PAIR, address, timeout_s=120, comm_timeout_s=120)
    del store
    model = load_on(torch.device("cuda", 0))
    for rank, found in enumerate(of_ranks):
        expected = decode(model, model.new_cache(2 * BLOCKS, 16), sequences(rank))
        for (tokens, logits), wanted in zip(found, expected, strict=True):
            assert tokens == wanted.tokens
            for a, b in zip(logits, wanted.logits, strict=True):
                assert torch.equal(torch.from_numpy(a), b)
