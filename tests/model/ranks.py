"""What one rank does in the layout tests: load its share, prefill, decode greedily, report."""

from dataclasses import dataclass, field
from typing import Any

import torch

from cluster.model.batch import ForwardBatch
from cluster.model.config import ModelConfig
from cluster.model.kv_cache import KVCache
from cluster.model.transformer import Transformer
from comms.groups import ParallelGroups
from router.placement import Placement
from tests.model.solo import make_batch

BLOCK_SIZE = 16


@dataclass(frozen=True, kw_only=True)
class Options:
    """How tokens travel; stands in for the served configuration's section of the same fields."""

    all2all_backend: str = "hierarchical"
    dispatch_dtype: Any = "bfloat16"
    combine: Any = "node"
    combine_dtype: Any = "bfloat16"
    dtype: torch.dtype = torch.float32
    num_redundant_experts: int = 0
    first_chunk: int | None = None
    """Prefill this many tokens of each prompt in a step of their own."""


@dataclass(kw_only=True)
class Served:
    """Of this rank's replica, on its leader: prefill logits and tokens by prompt index."""

    logits: dict[int, torch.Tensor] = field(default_factory=dict)
    tokens: dict[int, list[int]] = field(default_factory=dict)


def load_rank(groups: ParallelGroups, directory, options: Options) -> Transformer:
    config = ModelConfig.from_dir(directory)
    placement = Placement.contiguous(
        config.num_moe_layers,
        config.num_experts,
        groups.topology.world_size,
        options.num_redundant_experts,
        ranks_per_node=groups.topology.ranks_per_node,
    )
    return Transformer.load(directory, config, groups, placement, options.dtype, options)


def serve(groups: ParallelGroups, directory, options: Options, prompts, num_tokens) -> Served:
    """Each replica serves prompts[replica :: num_replicas] as one batch; some may have none."""
    torch.set_num_threads(1)
    model = load_rank(groups, directory, options)
    topology = groups.topology
    mine = list(range(topology.replica_of(groups.rank), len(prompts), topology.num_replicas))
    longest = max(len(prompt) for prompt in prompts) + num_tokens
    per_sequence = -(-longest // BLOCK_SIZE)
    num_blocks = per_sequence * len(mine) + 1
    cache = KVCache(model.config, topology, num_blocks, BLOCK_SIZE, options.dtype)
    blocks = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(groups.rank // 2))
    blocks = groups.tp.broadcast(blocks, 0).tolist()
    tables = {i: blocks[n * per_sequence : (n + 1) * per_sequence] for n, i in enumerate(mine)}

    def step(parts) -> torch.Tensor | None:
        batch = make_batch(parts, BLOCK_SIZE) if parts else ForwardBatch.empty()
        return model.forward(batch, cache)

    cut = options.first_chunk or 0
    whole = {i: prompts[i] for i in mine}
    chunks = [step([(p[:cut], 0, tables[i], range(len(p[:cut]))) for i, p in whole.items()])]
    chunks += [step([(p[cut:], cut, tables[i], range(len(p) - cut)) for i, p in whole.items()])]
    served = Served()
    if topology.tp_rank_of(groups.rank) == 0:
        _split_logits(served, chunks, whole, cut)
    served.tokens = {i: [] for i in mine}
    for done in range(num_tokens):
        if done:
            last = [
                (served.tokens[i][-1:], len(prompts[i]) + done - 1, tables[i], [0]) for i in mine
            ]
            logits = step(last)
        elif served.logits:
            logits = torch.stack([served.logits[i][-1] for i in mine])
        else:
            logits = None
        chosen = torch.zeros(len(mine), dtype=torch.int64)
        if logits is not None and len(mine):
            chosen = logits.argmax(dim=1)
        for i, token in zip(mine, groups.tp.broadcast(chosen, 0).tolist(), strict=True):
            served.tokens[i].append(token)
    return served if topology.tp_rank_of(groups.rank) == 0 else Served()


def _split_logits(served: Served, chunks, whole, cut) -> None:
    first, second = chunks
    a = b = 0
    for i, prompt in whole.items():
        head, tail = len(prompt[:cut]), len(prompt) - len(prompt[:cut])
        served.logits[i] = torch.cat([first[a : a + head], second[b : b + tail]])
        a, b = a + head, b + tail


def serve_timed(groups, *args):
    import time

    start = time.perf_counter()
    return serve(groups, *args), time.perf_counter() - start
