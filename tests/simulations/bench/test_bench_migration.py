"""The measurement of migrations: short blocks, on real ranks."""

import pytest

from deploy.settings import read_config
from simulations.bench import bench_migration


def test_blocks_changes_and_bytes(monkeypatch):
    monkeypatch.setattr(bench_migration, "BLOCK_STEPS", 6)
    monkeypatch.setattr(bench_migration, "WARM_UP_STEPS", 2)
    config = read_config(None, ["experts.num_redundant_experts=8"])
    report = bench_migration.run(config, blocks=1, changes_per_block=2)
    assert report["quiet"]["steps"] == report["busy"]["steps"] == 6
    assert 1 <= report["under way"]["steps"] <= 6
    assert 1 <= report["layers_changed"] <= 2  # the last may still be under way at the end
    expert_bytes = 3 * 256 * 64 * 2
    assert report["bytes"] == report["experts"] * expert_bytes > 0
    assert report["busy"]["p50_ms"] <= report["busy"]["p99_ms"] <= report["busy"]["max_ms"]


def test_more_steps_than_positions_are_refused():
    with pytest.raises(ValueError, match="blocks must be at most 10: the model has 2048 positions"):
        bench_migration.run(read_config(None, []), blocks=11, changes_per_block=1)
