"""The overlap benchmark: its cases add up. Whether one overlaps depends on how fast links are today."""

import pytest

from simulations.bench import bench_overlap
from simulations.bench.bench_overlap import Model

SMALL = Model(hosts=0, rate=None, hidden=64, experts=4, topk=2, layers=2)


def test_cases_add_up() -> None:
    report = bench_overlap.run(SMALL, tokens=(3, 20), ratios=(1.0,), repeats=2)
    assert [case["tokens"] for case in report["cases"]] == [3, 20]
    for case in report["cases"]:
        assert case["compute_s"] > 0
        assert case["comm_s"] > 0
        assert case["compute_s"] + case["comm_s"] == pytest.approx(case["serial_s"])
        hidden_s = case["hidden_fraction"] * min(case["compute_s"], case["comm_s"])
        assert case["serial_s"] - hidden_s == pytest.approx(case["overlapped_s"])


@pytest.mark.parametrize(("model", "repeats"), [(SMALL, 0), (Model(hosts=1), 1)])
def test_runs_that_cannot_be(model: Model, repeats: int) -> None:
    with pytest.raises(ValueError, match="need repeats >= 1, hosts 0 or >= 2"):
        bench_overlap.run(model, repeats=repeats)
