"""The latency table has every dispatcher over every transport at every size."""

import itertools

import pytest

from simulations.bench import bench_latency
from simulations.bench.moe_layer import Workload

WORKLOAD = Workload(hosts=0, ranks_per_host=2, hidden=128, experts=16, topk=2)


def test_every_combination_is_measured() -> None:
    report = bench_latency.run(WORKLOAD, tokens=(1, 3), rounds=1, layers_per_round=2)
    rows = report["results"]
    transports = [("shm", "tcp"), ("shm", "gloo"), ("tcp", "tcp"), ("gloo", "gloo")]
    found = [(row["dispatcher"], row["inside"], row["between"]) for row in rows]
    names = list(dict.fromkeys(name for name, _, _ in found))
    assert {"flat", "hierarchical"} <= set(names)
    assert found == [(name, *transport) for name, transport in itertools.product(names, transports)]
    for row in rows:
        assert list(row["us"]) == ["1", "3"]
        assert min(row["us"].values()) > 10  # two exchanges take longer than a few system calls


@pytest.mark.parametrize("options", [{"rounds": 0}, {"tokens": ()}, {"tokens": (4, 0)}])
def test_runs_that_cannot_be(options: dict) -> None:
    with pytest.raises(ValueError, match="need rounds, layers, tokens >= 1"):
        bench_latency.run(WORKLOAD, **options)
