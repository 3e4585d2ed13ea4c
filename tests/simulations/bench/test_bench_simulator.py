"""What `expertmesh bench simulator` computes, not how fast."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from deploy.bench import simulator as command
from deploy.cli import app
from simulations.bench import bench_simulator
from simulations.bench.bench_simulator import SIZES, Loads


def test_counts_are_of_all_tokens_and_spread_like_arrivals():
    deployment = SIZES["ep64"].deployment
    loads = Loads(deployment, range(1))
    counts = loads.counts(400)
    assert counts.shape == (400, 58, 320)
    assert counts.dtype == np.float32
    assert (counts >= 0).all()
    assert counts.sum(axis=-1).mean() == pytest.approx(128 * 64 * 8, rel=1e-3)
    mean, variance = counts.mean(axis=0), counts.var(axis=0)
    assert (variance / mean).mean() == pytest.approx(1, rel=0.02)
    assert np.log(mean).std() == pytest.approx(bench_simulator.SIGMA, rel=0.05)
    assert (Loads(deployment, range(1)).counts(400) == counts).all()


def test_units_have_loads_of_their_own():
    counts = Loads(SIZES["ep144x69"].deployment, range(2)).counts(1)
    assert counts.shape == (2, 58, 288)
    assert not np.allclose(counts[0], counts[1], rtol=0.2)


def test_the_command_reports_both_sizes(tmp_path, monkeypatch):
    real = bench_simulator.run
    monkeypatch.setattr(command.bench_simulator, "run", lambda: real(seconds=0.001))
    file = tmp_path / "speed.json"
    result = CliRunner().invoke(app, ["bench", "simulator", "--json", str(file)])
    assert result.exit_code == 0, result.output
    assert "9,936" in result.output
    rows = json.loads(file.read_text())["results"]
    assert {name: row["ranks"] for name, row in rows.items()} == {"ep64": 64, "ep144x69": 9936}
    for row in rows.values():
        assert min(row["steps_per_s"], row["steps_per_s_with_counts"], row["peak_bytes"]) > 0
