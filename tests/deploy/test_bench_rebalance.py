"""What `bench rebalance` makes of its samples, and its picture. The clusters themselves are served in
test_rebalancing.py."""

import numpy as np
import pytest
from typer.testing import CliRunner

from deploy.bench import rebalance as bench_rebalance
from deploy.bench.picture import draw_balance
from deploy.bench.rebalance import Run, _step_report, balancedness
from deploy.cli import app


def sample(when: float, domain: str, *ranks: list[int]) -> tuple[float, str, np.ndarray]:
    return when, domain, np.array(ranks)


def a_run() -> Run:
    """Two ranks, two layers: uneven English, even Chinese."""
    return Run(
        samples=[
            sample(0, "english", [0, 0], [0, 0]),
            sample(1, "english", [3000, 1000], [1000, 1000]),
            sample(2, "english", [6000, 2000], [2000, 2000]),
            sample(3, "chinese", [6000, 2000], [2000, 2000]),
            sample(4, "chinese", [6100, 2100], [2100, 2100]),
            sample(5, "chinese", [8000, 4000], [4000, 4000]),
        ]
    )


def test_balancedness_is_the_mean_over_layers_of_mean_over_max():
    assert balancedness(np.array([[3, 1], [1, 1]])) == pytest.approx((2 / 3 + 1) / 2)


def test_windows_have_enough_pairs():
    """Pairs that two samples say too little about wait for the next."""
    windows = list(a_run().balancedness())
    assert [(x, domain) for x, domain, _ in windows] == [
        (4.0, "english"), (8.0, "english"), (12.0, "chinese"),
    ]  # fmt: skip
    assert [y for *_, y in windows] == pytest.approx([5 / 6, 5 / 6, 1.0])


def test_first_and_last_third_of_a_domain():
    assert a_run().of_domain("english") == pytest.approx((5 / 6, 5 / 6))
    assert a_run().of_domain("chinese") == pytest.approx((1.0, 1.0))


def test_late_steps_are_counted():
    report = _step_report(np.array([0.1] * 99 + [0.5]), limit_s=0.2)
    assert (report["num"], report["p50_ms"], report["max_ms"]) == (100, 100.0, 500.0)
    assert report["late_share"] == 0.01
    assert _step_report(np.zeros(0), limit_s=0.2)["num"] == 0


@pytest.mark.parametrize(("suffix", "magic"), [("png", b"\x89PNG"), ("svg", b"<?xml")])
def test_the_picture(tmp_path, suffix, magic):
    path = tmp_path / f"balance.{suffix}"
    draw_balance(path, {"static": list(a_run().balancedness()), "rebalanced": []})
    assert path.read_bytes().startswith(magic)
    if suffix == "svg":
        assert b"english" in path.read_bytes()


@pytest.mark.parametrize(
    ("name", "complaint"), [("x.txt", "is a .png, .svg or .pdf file"), ("no/x.png", "no directory")]
)
def test_a_picture_that_cannot_be_is_refused_before_the_work(
    tmp_path, monkeypatch, name, complaint
):
    monkeypatch.setattr(bench_rebalance, "_compare", lambda *_: pytest.fail("it began"))
    result = CliRunner().invoke(app, ["bench", "rebalance", "--picture", str(tmp_path / name)])
    assert result.exit_code == 2
    assert complaint in result.stderr
