"""Same request, same tokens: `mosaic` in BF16, greedy and seeded, bit for bit.

Ring 1 on every layout: alone, among 30 others with prompts cut into chunks, under a cache so small
that sequences are preempted, with and without blocks that others computed, planned ahead or not, in ten
runs, and overlapped. Ring 2 by the default combine: across
EP/DP layouts, placements and dispatchers. Across TP sizes tokens are promised in fp32 only.
"""

import json
from dataclasses import replace
from functools import cache
from typing import Any
from unittest import mock

import pytest
import torch
from tokenizers import Tokenizer

from cluster import offline
from cluster.config import ServeConfig
from cluster.engine.engine import Leader, build_engine
from cluster.engine.mailbox import Frame, LocalMailbox
from cluster.engine.sampling_params import SamplingParams
from cluster.model import transformer
from cluster.model.micro_batches import Pass, interleave
from comms.groups import ParallelGroups
from comms.launch import RankPool
from comms.links import LinkSpeed
from comms.topology import Topology
from comms.where import Where
from deploy.settings import BUNDLED_MODELS

MOSAIC = BUNDLED_MODELS["mosaic"]
NUM_TOKENS = 200
FEW_TOKENS = 48  # where many clusters are compared
LAYOUTS = [(1, 1), (1, 2), (2, 1), (2, 2), (3, 2)]
TIMEOUT_S = 240
TEXTS = (
    "It is a truth universally acknowledged, that a single man",
    "話說天下大勢，分久必合，合久必分。",
    "def quicksort(items):\n    if len(items) <= 1:\n",
    "37 + 48 = ",
)


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(MOSAIC / "tokenizer.json"))


def watched(num_tokens: int = NUM_TOKENS) -> list[Frame]:
    """The two requests whose tokens must not change."""
    prompt = tokenizer().encode(TEXTS[0]).ids
    greedy = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
    seeded = SamplingParams(
        temperature=0.8, top_p=0.95, seed=11, max_tokens=num_tokens, ignore_eos=True
    )
    return [
        offline.add_frame("greedy", prompt, greedy),
        offline.add_frame("seeded", prompt, seeded),
    ]


def company() -> list[Frame]:
    """Thirty more of all domains, lengths and kinds."""
    frames = []
    for idx in range(30):
        text = TEXTS[idx % 4] * (1 + idx % 7)
        params = SamplingParams(
            temperature=[0.0, 1.0][idx % 2], seed=idx, max_tokens=5 + 7 * (idx % 9)
        )
        frames.append(offline.add_frame(f"other-{idx}", tokenizer().encode(text).ids, params))
    return frames


def config_for(nodes: int, ranks: int, **sections: dict[str, Any]) -> ServeConfig:
    parallel = {"num_nodes": nodes, "ranks_per_node": ranks, **sections.pop("parallel", {})}
    return ServeConfig.from_dict({"model": str(MOSAIC), "parallel": parallel, **sections})


def serve(pool: RankPool, config: ServeConfig, requests: list[Frame]) -> dict[str, list[int]]:
    """Token ids by request id."""
    topology = config.parallel.topology
    parts = pool.run(offline.generate, topology, config, requests, timeout_s=TIMEOUT_S)
    return {name: ids for part in parts for name, ids in part.items()}


def pick(tokens: dict[str, list[int]]) -> dict[str, list[int]]:
    return {name: tokens[name] for name in ("greedy", "seeded")}


@pytest.mark.timeout(TIMEOUT_S)
@pytest.mark.parametrize(("nodes", "ranks"), LAYOUTS)
def test_company_chunks_and_preemption_change_nothing(
    rank_pool: RankPool, nodes: int, ranks: int
) -> None:
    """Alone means one sequence at a time, all of it computed, each step planned when the one before is
    known; then all 32 at once, in chunks of at most 33 tokens, with a cache that cannot hold them all,
    blocks shared, and steps planned ahead."""
    alone = config_for(
        nodes,
        ranks,
        scheduler={"max_num_seqs": 1, "async_scheduling": False},
        cache={"enable_prefix_caching": False},
    )
    crowded = config_for(
        nodes,
        ranks,
        scheduler={"max_num_seqs": 32, "max_num_batched_tokens": 33, "async_scheduling": True},
        cache={"block_size": 16, "num_blocks": 48, "enable_prefix_caching": True},
    )
    by_itself = serve(rank_pool, alone, watched())
    in_company = serve(rank_pool, crowded, [*company(), *watched()])
    assert len(in_company) == 32
    assert pick(in_company) == pick(by_itself)
    assert [len(ids) for ids in pick(by_itself).values()] == [NUM_TOKENS] * 2


def events(groups: ParallelGroups, config: ServeConfig, requests: list[Frame]) -> tuple[int, int]:
    """Preemptions, and tokens found in the cache."""
    engine = build_engine(config, groups, LocalMailbox(requests))
    assert isinstance(engine, Leader)
    while engine.step():
        pass
    engine.runner.close()
    return engine.scheduler.num_preemptions, engine.scheduler.num_prefix_hits


def test_the_crowded_cache_does_preempt_and_share(rank_pool: RankPool) -> None:
    config = config_for(
        1,
        1,
        scheduler={"max_num_seqs": 32, "max_num_batched_tokens": 33},
        cache={"block_size": 16, "num_blocks": 48},
    )
    topology = Topology(num_nodes=1, ranks_per_node=1)
    requests = [*company(), *watched()]
    [counts] = rank_pool.run(events, topology, config, requests, timeout_s=TIMEOUT_S)
    assert min(counts) > 0


@pytest.mark.parametrize("chunk", [1, 7, 64, 512])
def test_any_chunk_size(rank_pool: RankPool, chunk: int) -> None:
    """A prompt of 300 tokens, cut differently."""
    prompt = (tokenizer().encode("".join(TEXTS)).ids * 20)[:300]
    params = SamplingParams(temperature=0.8, seed=5, max_tokens=16, ignore_eos=True)
    request = [offline.add_frame("chunked", prompt, params)]
    config = config_for(1, 2, scheduler={"max_num_seqs": 1, "max_num_batched_tokens": chunk})
    whole = config_for(1, 2, scheduler={"max_num_seqs": 1, "max_num_batched_tokens": 300})
    assert serve(rank_pool, config, request) == serve(rank_pool, whole, request)


@pytest.mark.timeout(TIMEOUT_S)
def test_ten_runs(rank_pool: RankPool) -> None:
    config = config_for(2, 2)
    runs = [json.dumps(serve(rank_pool, config, watched(FEW_TOKENS))) for _ in range(10)]
    assert len(set(runs)) == 1


@pytest.mark.timeout(TIMEOUT_S)
def test_layouts_dispatchers_and_placements_change_nothing(rank_pool: RankPool) -> None:
    """Ring 2 in BF16, at one TP size: EP/DP layouts, dispatchers, redundant experts and their split."""
    flat, low_latency = {"all2all_backend": "flat"}, {"all2all_backend": "low_latency"}
    configs = [
        config_for(1, 1),
        config_for(2, 1),
        config_for(2, 2, parallel={"tensor_parallel_size": 1}),
        config_for(3, 2, parallel={"tensor_parallel_size": 1}),
        config_for(2, 1, comms=flat),
        config_for(2, 1, comms=low_latency),
        config_for(2, 1, experts={"num_redundant_experts": 8}),
        config_for(
            2,
            2,
            parallel={"tensor_parallel_size": 1},
            experts={"num_redundant_experts": 8, "split": "balanced"},
        ),
    ]
    runs = [serve(rank_pool, config, watched(FEW_TOKENS)) for config in configs]
    assert all(run == runs[0] for run in runs)


@pytest.mark.timeout(TIMEOUT_S)
def test_exact_combine_is_equal_across_layouts(rank_pool: RankPool) -> None:
    configs = [config_for(nodes, 1, comms={"combine": "exact"}) for nodes in (1, 2)]
    runs = [serve(rank_pool, config, watched(FEW_TOKENS)) for config in configs]
    assert runs[0] == runs[1]


def generate_overlapped(
    groups: ParallelGroups, config: ServeConfig, requests: list[Frame]
) -> tuple[dict[str, list[int]], int]:
    """offline.generate over links so slow that everything is overlapped, and in how many steps
    there were two micro-batches."""
    groups = replace(groups, links=LinkSpeed(latency_s=0.0, bytes_per_s=1.0))
    halves = []

    def counted(passes: list[Pass], where: Where) -> list[torch.Tensor]:
        halves.append(len(passes) == 2)
        return interleave(passes, where)

    with mock.patch.object(transformer, "interleave", counted):
        return offline.generate(groups, config, requests), sum(halves)


@pytest.mark.timeout(TIMEOUT_S)
def test_overlap_changes_nothing(rank_pool: RankPool) -> None:
    """Two parts and two micro-batches, in steps with much to do; alone there is nothing to split.
    Each micro-batch is evened out over copies of experts while the other is in flight."""
    config = config_for(
        2,
        2,
        scheduler={"max_num_seqs": 32, "max_num_batched_tokens": 64},
        cache={"num_blocks": 64, "enable_prefix_caching": False},  # or there is little to split
        experts={"num_redundant_experts": 8, "split": "balanced"},
    )
    requests = [*company(), *watched(FEW_TOKENS)]
    topology = config.parallel.topology
    parts = rank_pool.run(generate_overlapped, topology, config, requests, timeout_s=TIMEOUT_S)
    tokens = {name: ids for part, _ in parts for name, ids in part.items()}
    assert min(halves for _, halves in parts) > 10
    assert pick(tokens) == pick(serve(rank_pool, config_for(2, 2), watched(FEW_TOKENS)))


@pytest.mark.timeout(TIMEOUT_S)
def test_fp32_is_equal_across_all_layouts(rank_pool: RankPool) -> None:
    configs = [config_for(nodes, ranks) for nodes, ranks in LAYOUTS]
    runs = [
        serve(rank_pool, config.model_copy(update={"dtype": "float32"}), watched(FEW_TOKENS))
        for config in configs
    ]
    assert all(run == runs[0] for run in runs)


def test_bf16_logits_across_tp_sizes_differ_by_rounding_only(rank_pool: RankPool) -> None:
    """Ring 3 is not promised in BF16. Relative L2 per row: 0.011 in the median; a row whose gate
    chose another expert differs more."""
    prompt = tokenizer().encode("".join(TEXTS)).ids
    topologies = [Topology(num_nodes=1, ranks_per_node=ranks) for ranks in (1, 2)]
    logits = [
        rank_pool.run(
            offline.prefill_logits,
            topology,
            config_for(1, topology.ranks_per_node, comms={"combine": "exact"}),
            [prompt],
            timeout_s=TIMEOUT_S,
        )[0][0]
        for topology in topologies
    ]
    difference = torch.linalg.vector_norm(logits[0] - logits[1], dim=1)
    relative = difference / torch.linalg.vector_norm(logits[0], dim=1)
    assert 0 < relative.median() < 0.03
