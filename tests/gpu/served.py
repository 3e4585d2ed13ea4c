"""The engine, without Ray, on one GPU or on a pair of ranks; requests of all kinds for it."""

from __future__ import annotations

from unittest.mock import patch

from cluster import offline
from cluster.config import ServeConfig
from cluster.engine.sampling_params import SamplingParams
from comms.groups import ParallelGroups
from comms.launch import RankPool
from tests.gpu.greedy import MOSAIC, prompts


def configured(
    nodes: int = 1, ranks: int = 2, tp: int = 1, *, most: int = 8, **more
) -> ServeConfig:
    """Steps of up to `most` tokens: few kernels to compile, few graphs to capture."""
    scheduler = {"max_num_batched_tokens": most, "max_num_seqs": 8, **more.pop("scheduler", {})}
    return ServeConfig.from_dict(
        {
            "model": str(MOSAIC),
            "device": "cuda",
            "parallel": {"num_nodes": nodes, "ranks_per_node": ranks, "tensor_parallel_size": tp},
            "scheduler": scheduler,
            **more,
        }
    )


def requests(number: int) -> list[dict]:
    """Of all lengths, one with a far wider table than the others; greedy and seeded; one asks for its
    experts."""
    ids = prompts()
    frames = []
    for i in range(number):
        length = 700 if i == 3 else 9 + 7 * i
        token_ids = (ids[i % 4] * (1 + length // 9))[:length]
        how = {"temperature": 0.0} if i % 3 else {"temperature": 0.9, "seed": i}
        wanted = 160 if i == 8 else 8 + 5 * i % 37
        params = SamplingParams(**how, max_tokens=wanted, ignore_eos=True)
        frames.append(offline.add_frame(f"r{i}", token_ids, params))
    if number > 5:
        frames[5]["routed_experts"] = True
    return frames


def on_two(pair: RankPool, config: ServeConfig, frames, changes=(), address="", fn=None) -> dict:
    """Token ids by request."""
    parts = pair.run(
        fn or offline.generate, config.parallel.topology, config, frames, changes, address,
        timeout_s=150, comm_timeout_s=120,
    )  # fmt: skip
    return {name: ids for part in parts for name, ids in part.items()}


def with_few_graphs(groups: ParallelGroups, *arguments) -> dict:
    """`offline.generate` with graphs of up to 8 rows: larger steps launch kernel by kernel."""
    from cluster.model.cuda import graphs, transformer

    rows = (1, 2, 8)
    with patch.object(graphs, "ROWS", rows), patch.object(transformer, "ROWS", rows):
        return offline.generate(groups, *arguments)
