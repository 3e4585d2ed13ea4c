"""Scripted changes and what the ranks then report of their experts, on a tiny model."""

from contextlib import closing
from itertools import pairwise

import numpy as np
import pytest

from cluster import offline
from cluster.config import ServeConfig
from cluster.engine.engine import build_engine
from cluster.engine.mailbox import LocalMailbox
from cluster.engine.sampling_params import SamplingParams
from cluster.model.config import ModelConfig
from cluster.scripted import Change, Script
from comms.groups import ParallelGroups
from comms.launch import RankError
from comms.store import host_store
from router.placement import Placement, settle

NUM_TOKENS, PROMPT = 40, [5, 6, 7]


@pytest.fixture
def config(tiny_checkpoint) -> ServeConfig:
    return ServeConfig.from_dict(
        {
            "model": str(tiny_checkpoint("qwen3_moe_norm")),
            "dtype": "float32",
            "parallel": {"num_nodes": 2, "ranks_per_node": 1},
            "experts": {"num_redundant_experts": 2},
        }
    )


@pytest.fixture
def address():
    store, text = host_store()
    yield text
    del store


def changed(config: ServeConfig) -> tuple[list[Change], list[Placement]]:
    """Three changes, and the placements before, between and after them."""
    model, rng = ModelConfig.from_dir(config.model), np.random.default_rng(0)
    placements = [
        Placement.contiguous(model.num_moe_layers, model.num_experts, 2, 2, ranks_per_node=1)
    ]
    changes = []
    for number in range(3):
        now, layer = placements[-1], number % model.num_moe_layers
        target = rng.permutation(now.physical_to_logical[layer])
        row = settle(now.physical_to_logical[layer], target, now.slots_per_rank)
        placements.append(now.with_layers({layer: row}))
        changes.append(Change(4 * number, layer, row.tolist()))
    return changes, placements


def frames(count: int):
    params = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)
    return [offline.add_frame(f"r{i}", [*PROMPT, i], params) for i in range(count)]


def watch(groups: ParallelGroups, config: ServeConfig, changes: list[Change], address: str):
    """Engine and script as `offline.generate` has them; two requests on each leader."""
    mailbox = LocalMailbox(frames(4)[groups.rank :: 2])
    engine = build_engine(config, groups, mailbox)
    with closing(engine.runner) as runner, Script(changes, runner, mailbox, groups, address):
        while engine.step():
            pass
        return runner.expert_stats()


def test_reports_add_up(rank_pool, config, address):
    changes, placements = changed(config)
    reports = rank_pool.run(watch, config.parallel.topology, config, changes, address)
    model, num_moves = ModelConfig.from_dir(config.model), 0
    for before, after in pairwise(placements):
        num_moves += len(after.moves_from(before))
    num_tokens = 4 * (len(PROMPT) + 1 + NUM_TOKENS - 1)  # nobody computes with the last one
    num_pairs = num_tokens * model.gate.num_experts_per_token
    routed_LE = np.sum([report["routed"] for report in reports], axis=0)
    served_L = np.sum([report["served"] for report in reports], axis=0)
    assert routed_LE.shape == (model.num_moe_layers, model.num_experts)
    assert routed_LE.sum(axis=1).tolist() == served_L.tolist() == [num_pairs] * len(served_L)
    expert_bytes = 3 * model.hidden_size * model.expert_intermediate_size * 4
    moved = [report["migration"]["bytes"] for report in reports]
    assert sum(m["remote"] for m in moved) == num_moves * expert_bytes > 0
    for report, m in zip(reports, moved, strict=True):
        assert m["node"] == m["disk"] == 0
        assert report["epoch"] == report["migration"]["flipped"] == 3
        assert 0 < len(report["step_seconds"]) == report["step"] - 1
        assert min(report["step_seconds"]) > 0
        for rows_MK in report["rows"]:
            assert np.array(rows_MK).shape == (2, model.gate.num_experts_per_token)
            assert set(np.array(rows_MK).flat) <= set(range(model.num_experts))


def test_tokens_do_not_depend_on_the_changes(rank_pool, config, address):
    changes, _ = changed(config)
    topology = config.parallel.topology
    static = rank_pool.run(offline.generate, topology, config, frames(4))
    assert rank_pool.run(offline.generate, topology, config, frames(4), changes, address) == static


def test_a_script_that_does_not_come_to_its_end_is_an_error(rank_pool, config, address):
    changes, _ = changed(config)
    late = [changes[0], changes[1]._replace(after_step=10_000)]
    with pytest.raises(RankError, match="1 of 2 changes are in force: the requests ended before"):
        rank_pool.run(offline.generate, config.parallel.topology, config, frames(4), late, address)
    wrong = [changes[0]._replace(row=[0] * len(changes[0].row))]
    with pytest.raises(RankError, match=r"0 of 1 changes are in force: .*no copy of experts"):
        rank_pool.run(offline.generate, config.parallel.topology, config, frames(4), wrong, address)
