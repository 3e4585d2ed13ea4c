"""The sweep's machinery: the grid, the same result however it was interrupted, dead processes."""

import os
import signal
from dataclasses import asdict, replace
from itertools import islice
from multiprocessing import active_children

import pytest

from simulations.processes import each_finished
from simulations.sweep.point_store import PointStore
from simulations.sweep.sweep import Grid, sweep

GRID = Grid(
    num_nodes=(1, 2),
    ranks_per_node=(4,),
    num_redundant_experts=(0, 8, 16),
    tokens_per_rank=(32,),
    context=(4096,),
    overlap=("none",),
    policy=("none", "ours"),
)
POINTS = list(GRID.points())


def evaluate(point):
    """Stands in for a simulation."""
    value = point.num_nodes * 1000 + point.num_redundant_experts + len(point.policy) / 3
    return {"status": "ok", "value": value}


def die(point):
    if point.num_nodes == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return {}


def refuse(point):
    raise ValueError(f"cannot do {point.policy}")


def own_children() -> list[str]:
    """Processes of a sweep; ranks that other tests keep for later are not ours."""
    return [child.name for child in active_children() if not child.name.startswith("expertmesh-")]


def swept(store, *, stop_after=None, num_processes=1, points=POINTS, about="a"):
    def finished(count: int) -> None:
        if count == stop_after:
            raise KeyboardInterrupt

    return sweep(
        points,
        evaluate,
        store=store,
        about=about,
        num_processes=num_processes,
        finished=finished,
    )


def test_the_grid_is_every_combination_last_axis_fastest() -> None:
    assert len(GRID) == len(POINTS) == len(set(POINTS)) == 12
    assert [point.policy for point in POINTS[:3]] == ["none", "ours", "none"]
    assert [point.num_nodes for point in POINTS] == [1] * 6 + [2] * 6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_nodes": ()}, "num_nodes needs values"),
        ({"policy": ("ours", "ours")}, "policy needs values that differ"),
        ({"num_nodes": (0,)}, "num_nodes must be at least 1, got 0"),
        ({"num_redundant_experts": (0, -1)}, "num_redundant_experts must be at least 0, got -1"),
    ],
)
def test_axes_that_cannot_be(change, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(GRID, **change)


def test_results_are_in_the_order_of_the_grid_whoever_finishes_first() -> None:
    expected = {point: evaluate(point) for point in POINTS}
    for num_processes in (1, 3):
        done = swept(PointStore(), num_processes=num_processes)
        assert list(done.results.items()) == list(expected.items())
        assert not done.interrupted


@pytest.mark.parametrize("num_processes", [1, 2])
def test_an_interrupted_sweep_goes_on(tmp_path, num_processes: int) -> None:
    path = tmp_path / "points.jsonl"
    first = swept(PointStore(path), stop_after=5, num_processes=num_processes)
    assert first.interrupted
    assert len(first.results) == 5
    assert not own_children()
    evaluated = []

    def counted(point):
        evaluated.append(point)
        return evaluate(point)

    rest = sweep(POINTS, counted, store=PointStore(path), about="a")
    assert sorted(map(str, evaluated)) == sorted(str(p) for p in POINTS if p not in first.results)
    assert list(rest.results.items()) == list(swept(PointStore()).results.items())


def test_finished_points_are_of_this_study_only(tmp_path) -> None:
    path = tmp_path / "points.jsonl"
    swept(PointStore(path))
    store = PointStore(path)
    swept(store, about={"seed": 1})
    assert len(store) == 2 * len(POINTS)
    larger = replace(GRID, num_nodes=(1, 2, 3))
    counts = []
    sweep(
        list(larger.points()),
        evaluate,
        store=PointStore(path),
        about="a",
        finished=counts.append,
    )
    assert counts == list(range(12, 19))


def test_a_process_that_dies_is_told_and_what_was_done_is_kept() -> None:
    with pytest.raises(RuntimeError, match="a process was killed"):
        sweep(POINTS, die, store=PointStore(), about="", num_processes=2)
    assert not own_children()


@pytest.mark.parametrize("num_processes", [1, 2])
def test_errors_of_points_come_through(num_processes: int) -> None:
    with pytest.raises(ValueError, match=r"cannot do (none|ours)"):
        sweep(POINTS, refuse, store=PointStore(), about="", num_processes=num_processes)
    assert not own_children()


def test_processes_have_one_thread_and_end_with_who_leaves_early() -> None:
    before = dict(os.environ)
    results = each_finished(threads_of_process, POINTS, 2)
    assert {result for _, result in islice(results, 3)} == {"1"}
    results.close()
    assert not own_children()
    assert dict(os.environ) == before


def threads_of_process(point):
    return os.environ["OMP_NUM_THREADS"]


def test_points_are_plain_data() -> None:
    assert asdict(POINTS[-1]) == {
        "num_nodes": 2,
        "ranks_per_node": 4,
        "num_redundant_experts": 16,
        "tokens_per_rank": 32,
        "context": 4096,
        "overlap": "none",
        "policy": "ours",
    }
