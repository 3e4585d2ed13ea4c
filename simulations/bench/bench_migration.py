"""What moving experts costs the steps meanwhile: blocks of quiet and of busy steps in turns, one run.

In a busy block one layer after the other gets experts dealt out anew over all ranks: far more moves than
any load asks for. The served engine runs without Ray and gRPC around it, on this machine.
"""

from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cluster.config import ServeConfig
from cluster.engine.engine import build_engine
from cluster.engine.mailbox import LocalMailbox
from cluster.engine.sampling_params import SamplingParams
from cluster.model.config import ModelConfig
from cluster.offline import add_frame
from cluster.scripted import Change, Script
from comms.groups import ParallelGroups
from comms.launch import RankPool
from comms.store import host_store
from router.placement import Placement, settle

WARM_UP_STEPS = 20
BLOCK_STEPS = 100
SEQUENCES = 4
PROMPT_TOKENS = 20
TIMEOUT_S = 900.0


def run(config: ServeConfig, blocks: int, changes_per_block: int) -> dict[str, Any]:
    """Decode through `blocks` quiet and as many busy blocks.

    Returns milliseconds of rank 0's steps ("quiet", "busy", and "under way": those at whose end
    experts were on their way to some rank, or that put a layer in force), "bytes", "longest_stall_ms".
    Raises ValueError for more steps than the model has positions, RuntimeError if a change failed.
    """
    topology = config.parallel.topology
    limit = ModelConfig.from_dir(config.model).max_position_embeddings
    if WARM_UP_STEPS + 2 * blocks * BLOCK_STEPS + PROMPT_TOKENS >= limit:
        most = (limit - WARM_UP_STEPS - PROMPT_TOKENS - 1) // (2 * BLOCK_STEPS)
        raise ValueError(f"blocks must be at most {most}: the model has {limit} positions")
    changes = _changes(config, blocks, changes_per_block)
    steps = WARM_UP_STEPS + 2 * blocks * BLOCK_STEPS
    store, address = host_store()  # kept: the ranks meet there
    with RankPool(topology.world_size) as pool:
        ranks = pool.run(
            _decode, topology, _roomy(config, steps), changes, steps, address, timeout_s=TIMEOUT_S
        )
    del store
    failures = [failure for *_, failure in ranks if failure]
    if failures:
        raise RuntimeError(f"a change of the placement failed: {failures[0]}")
    step_ms, metrics = 1e3 * np.array(ranks[0][0]), [rank[2] for rank in ranks]
    under_way = np.any([moving for _, moving, *_ in ranks], axis=0)
    block = (np.arange(steps) - WARM_UP_STEPS) // BLOCK_STEPS
    measured = np.arange(steps) >= WARM_UP_STEPS
    return {
        "quiet": _percentiles(step_ms[measured & (block % 2 == 0)]),
        "busy": _percentiles(step_ms[measured & (block % 2 == 1)]),
        "under way": _percentiles(step_ms[measured & under_way]),
        "layers_changed": metrics[0]["flipped"],
        "experts": sum(m["experts"] for m in metrics),
        "bytes": sum(sum(m["bytes"].values()) for m in metrics),
        "longest_stall_ms": 1e3 * max(m["longest_flip_s"] for m in metrics),
    }


def _changes(config: ServeConfig, blocks: int, per_block: int) -> list[Change]:
    """The layers in turn, each with its experts and spare copies dealt out anew."""
    model, parallel = ModelConfig.from_dir(config.model), config.parallel
    placement = Placement.contiguous(
        model.num_moe_layers,
        model.num_experts,
        parallel.world_size,
        config.experts.num_redundant_experts,
        ranks_per_node=parallel.ranks_per_node,
    )
    rng = np.random.default_rng(0)
    changes: list[Change] = []
    spare = placement.num_slots - model.num_experts
    for block in range(blocks):
        for number in range(per_block):
            layer = len(changes) % model.num_moe_layers
            extra = rng.choice(model.num_experts, spare, replace=spare > model.num_experts)
            dealt_S = rng.permutation(np.concatenate([np.arange(model.num_experts), extra]))
            before_S = placement.physical_to_logical[layer]
            row_S = settle(before_S, dealt_S, placement.slots_per_rank)
            placement = placement.with_layers({layer: row_S})
            step = WARM_UP_STEPS + BLOCK_STEPS * (2 * block + 1) + number
            changes.append(Change(step, layer, row_S.tolist()))
    return changes


def _roomy(config: ServeConfig, steps: int) -> ServeConfig:
    blocks = SEQUENCES * ((steps + PROMPT_TOKENS) // config.cache.block_size + 2)
    return config.model_copy(
        update={"cache": config.cache.model_copy(update={"num_blocks": blocks})}
    )


def _decode(
    groups: ParallelGroups, config: ServeConfig, changes: list[Change], steps: int, address: str
) -> tuple[list[float], list[bool], dict[str, Any], str]:
    """Of one rank: seconds of each step, whether experts were under way, what moved, and a failure."""
    params = SamplingParams(temperature=0.0, max_tokens=steps + 1, ignore_eos=True)
    requests = [add_frame(f"{i}", [3 + i] * PROMPT_TOKENS, params) for i in range(SEQUENCES)]
    is_leader = groups.topology.tp_rank_of(groups.rank) == 0
    mailbox = LocalMailbox(requests) if is_leader else None
    engine = build_engine(config, groups, mailbox)
    runner = engine.runner
    seconds, under_way = [], []
    with Script(changes, runner, mailbox, groups, address) as script:
        for _ in range(steps):
            epoch, start = runner.epoch, perf_counter()
            engine.step()
            seconds.append(perf_counter() - start)
            under_way.append(runner.migrator.preparing or runner.epoch != epoch)
    metrics = runner.migrator.metrics()
    runner.close()
    return seconds, under_way, metrics, script.failure


def _percentiles(step_ms: NDArray[np.float64]) -> dict[str, float]:
    if not len(step_ms):
        return {"steps": 0}
    p50, p90, p99 = np.percentile(step_ms, (50, 90, 99))
    return {
        "steps": len(step_ms),
        "p50_ms": float(p50),
        "p90_ms": float(p90),
        "p99_ms": float(p99),
        "max_ms": float(step_ms.max()),
    }
